"""The chapters on a reward model, on cases small enough to work out by hand; its scores against
transformers alone.
"""

import dataclasses
import math

import numpy as np
import pytest
import scipy.stats
import tiny
import torch

from eval import benchmarks, generations, judges, reward_inputs, reward_measures
from eval.judges import AnswerScores
from eval.reward_measures import Answers
from train.data.packing import Group, pack
from train.data.rows import Candidates
from train.methods.rewards import OwnClass


def candidates(num_chosen, texts):
    answers = tuple({"role": "assistant", "content": text} for text in texts)
    return Candidates([{"role": "user", "content": "?"}], answers, num_chosen, {})


def answer_scores(scores, lengths=None, prompts=None):
    """AnswerScores of rows of scores."""
    counts = np.array([len(row) for row in scores])
    flat = np.concatenate([np.array(row, dtype=float) for row in scores])
    return AnswerScores(
        rows=np.arange(len(scores)),
        prompts=np.arange(len(scores)) if prompts is None else np.array(prompts),
        counts=counts,
        lengths=np.ones(len(flat), dtype=int) if lengths is None else np.array(lengths),
        scores=flat,
    )


def opened(rows, by=None, benchmark=None, ids=None):
    """RewardInputs as the measures read them."""
    return reward_inputs.RewardInputs(
        path="rm",
        record={},
        recipe={},
        tokenizer=None,
        data=None,
        rows=rows,
        by=by,
        benchmark=benchmark,
        ids=ids,
        described={},
    )


PAIRS = [candidates(1, texts) for texts in (("long", "a"), ("b", "ab"), ("c", "d"), ("ee", "f"))]
SCORES = [[2, 1], [0, 0], [-1, 1], [3, 0]]  # margins 1, 0, -2, 3


def test_pairs_by_hand():
    lengths = [5, 10, 4, 4, 8, 2, 2, 3]
    chapter, tables = reward_measures.measure(
        opened(PAIRS), answer_scores(SCORES, lengths, prompts=[7, 7, 1, 2])
    )
    section = chapter["preferences"]
    value = {name: estimate["value"] for name, estimate in section["model"].items()}
    assert tables["rewards"]["margin"].tolist() == [1, 0, -2, 3]
    assert tables["rewards"]["correct"].tolist() == [1, 0.5, 0, 1]
    assert value["rewards/accuracies"] == 2.5 / 4  # a tie is one half,
    assert value["rewards/accuracies_ties_lost"] == 2 / 4  # or lost, as RewardBench has it
    assert value["rewards/margins"] == 0.5
    assert value["rewards/chosen"] == 1 and value["rewards/rejected"] == 0.5
    losses = [math.log1p(math.exp(-margin)) for margin in (1, 0, -2, 3)]
    assert value["loss"] == pytest.approx(np.mean(losses), rel=1e-12)
    assert not {"rewards/pair_accuracies", "rewards/row_margins"} & set(value)
    assert section["chance"] == 0.5
    assert section["model"]["rewards/accuracies"]["prompts"] == 3
    # sigmoid of 1, 0, 2 and 3: right, a tie, wrong, right; each in a bin of its own
    sure = [1 / (1 + math.exp(-m)) for m in (1, 0, 2, 3)]
    error = ((1 - sure[0]) + 0 + sure[2] + (1 - sure[3])) / 4
    assert section["calibration"]["ece"]["value"] == pytest.approx(error)
    # longer in characters: the first and the last pair's chosen answers; not the second's; a tie
    rules = chapter["baselines"]
    assert rules["longer_wins"]["value"] == (1 + 0 + 0.5 + 1) / 4
    assert rules["model_minus_longer_wins"]["value"] == pytest.approx(0)
    # rank correlations, against scipy's; lengths of a pair relative to the longer: -.5, 0, .75, -1/3
    flat = [score for row in SCORES for score in row]
    rho = scipy.stats.spearmanr(flat, lengths).statistic
    assert section["score_length_correlation"]["value"] == pytest.approx(rho)
    rho = scipy.stats.spearmanr([1, 0, -2, 3], [-0.5, 0, 0.75, -1 / 3]).statistic
    assert section["length_correlation"]["value"] == pytest.approx(rho)
    assert tables["answers"]["score"].tolist() == flat
    assert tables["answers"]["answer"].tolist() == [0, 1] * 4
    assert tables["answers"]["chosen"].tolist() == [True, False] * 4


def test_best_of_several_by_hand():
    """Won; lost to one of three; a tie of three for the best; two right answers above all others."""
    rows = [candidates(1, "abcd")] * 3 + [candidates(2, ["long", "b", "a"])]
    scores = [[3, 1, 2, 0], [1, 0, 2, 0], [2, 2, 0, 2], [5, 3, 2]]
    chapter, tables = reward_measures.measure(opened(rows), answer_scores(scores))
    assert tables["rewards"]["margin"].tolist() == [1, -1, 0, 1]
    assert tables["rewards"]["correct"].tolist() == [1, 0, 1 / 3, 1]
    section = chapter["preferences"]
    value = {name: estimate["value"] for name, estimate in section["model"].items()}
    assert value["rewards/accuracies"] == pytest.approx((1 + 0 + 1 / 3 + 1) / 4)
    assert value["rewards/accuracies_ties_lost"] == 0.5
    # guessing: one of four, and two of three before the third, which is one order of three
    assert section["chance"] == (3 / 4 + 1 / 3) / 4
    # pairs: 3 + 3 + 3 + 2, differences 2 1 3, 1 -1 1, 0 2 0, 3 1
    assert section["pairs"] == 11 and section["answers"] == 15
    assert value["rewards/margins"] == pytest.approx((6 + 1 + 2 + 4) / 11)
    assert value["rewards/row_margins"] == 1 / 4
    assert value["rewards/pair_accuracies"] == pytest.approx((3 + 2 + 2 + 2) / 11)
    # characters: all alike in three rows, a quarter each; the fourth's second answer ties: 1/2
    rule = chapter["baselines"]["longest_of_row_wins"]["value"]
    assert rule == pytest.approx((3 / 4 + 1 / 2) / 4)
    assert "chosen_score" not in tables["rewards"]


def test_a_right_answer_below_a_wrong_one_loses_the_row():
    answers = Answers.of(answer_scores([[5, 1, 2]]), [candidates(2, "abc")])
    margins, shares = reward_measures.wins_of_rows(answers.scores, answers)
    assert margins.tolist() == [-1] and shares.tolist() == [0]


def test_rows_by_a_column():
    by = ["b", "a", "b", "a"]
    chapter, tables = reward_measures.measure(opened(PAIRS, by=by), answer_scores(SCORES))
    assert [row["name"] for row in chapter["by"]] == ["a", "b"]
    assert [row["value"] for row in chapter["by"]] == [(0.5 + 1) / 2, 1 / 2]
    assert [row["ties_lost"] for row in chapter["by"]] == [0.5, 0.5]
    assert [row["margin"]["value"] for row in chapter["by"]] == [1.5, -0.5]
    assert tables["rewards"]["by"] == by and "benchmark" not in chapter


def test_sections_of_reward_bench_by_hand():
    subsets = ["alpacaeval-easy"] * 2 + ["mt-bench-easy", "math-prm"] + ["hep-cpp"] * 2 + ["hep-go"]
    won = np.array([1, 0, 1, 1, 0, 0, 1], dtype=float)
    found = benchmarks.reward_bench(subsets, won, np.arange(7))
    sections = {name: section["value"] for name, section in found["sections"].items()}
    assert sections == {
        "Chat": pytest.approx((100 * 0.5 + 28 * 1) / 128),
        "Reasoning": pytest.approx((984 * 1 + 164 * 0 + 164 * 1) / (984 + 328)),
    }
    assert found["score"] is None and "donotanswer" in found["missing"]
    assert found["sections"]["Reasoning"]["n"] == 4
    names = ["alpacaeval-easy", "mt-bench-hard", "xstest-should-refuse", "donotanswer", "math-prm"]
    whole = benchmarks.reward_bench(names, np.array([1.0, 0, 1, 0, 1]), np.arange(5))
    score = (1 + 0 + 154 / (154 + 136) + 1) / 4  # the mean of the sections
    assert whole["score"]["value"] == pytest.approx(score)


def test_weights_are_the_published_ones():
    """2,985 prompts, math-prm raised from 447 to 984: as many as code's six languages."""
    assert len(benchmarks.WEIGHTS) == 23
    assert sum(benchmarks.WEIGHTS.values()) - 984 + 447 == 2985
    assert benchmarks.WEIGHTS["math-prm"] == sum(
        weight for name, weight in benchmarks.WEIGHTS.items() if name.startswith("hep-")
    )


def test_intervals_of_sections_resample_prompts():
    """Two subsets of 100 prompts each: the section's deviation is that of a weighted mean."""
    rng = np.random.default_rng(0)
    won = (rng.random(200) < 0.7).astype(float)
    subsets = ["refusals-dangerous"] * 100 + ["donotanswer"] * 100
    section = benchmarks.reward_bench(subsets, won, np.arange(200))["sections"]["Safety"]
    p = won[:100].mean(), won[100:].mean()
    shares = 100 / 236, 136 / 236
    deviation = math.sqrt(sum(s * s * q * (1 - q) / 100 for s, q in zip(shares, p, strict=True)))
    low, high = section["interval"]
    assert (high - low) / 2 == pytest.approx(1.96 * deviation, rel=0.1)
    all_won = benchmarks.reward_bench(subsets, np.ones(200), np.arange(200))["sections"]["Safety"]
    assert all_won["interval"][0] < 1 and "Wilson" in all_won["method"]


# Of two prompts, as tied and as ref: (scores, right ones among them).
TIES = {
    "tied:0": ([4.0, 3.0, 1.0], 2),  # gap 3 - 1 = 2, spread 1: accurate, preferred
    "ref:0": ([5.0, 4.5], 1),  # gap 0.5: accurate, but below the spread, so not preferred when hard
    "tied:1": ([4.0, 2.0, 3.0], 2),  # gap -1, spread 2: neither
    "ref:1": ([1.0, 2.0], 1),  # gap -1: not accurate
}


def test_ties_of_reward_bench_2_by_hand():
    answers = [(np.array(scores), right) for scores, right in TIES.values()]
    found = benchmarks.ties_score(list(TIES), answers)
    assert found["accuracy_tied"] == 0.5 and found["accuracy_ref"] == 0.5
    assert found["preferred"] == 0.5 and found["preferred_hard"] == 0
    margin = (math.tanh(0.5 / 1 - 1) + math.tanh(-1 / 2 - 1)) / 2
    assert found["margin"] == pytest.approx(margin)
    assert found["score"] == pytest.approx(0.3 * 0.5 + 0.3 * 0.5 + 0.2 * 0.5 + 0.01 * margin)
    # no spread among right answers: a gap is infinitely wide, and no gap counts 0
    wide = [(np.array([2.0, 2.0, 1.0]), 2), (np.array([2.0, 1.0]), 1)]
    assert benchmarks.ties_score(["tied:5", "ref:5"], wide)["margin"] == 1
    flat = [(np.array([1.0, 1.0, 1.0]), 2), (np.array([1.0, 1.0]), 1)]
    assert benchmarks.ties_score(["tied:5", "ref:5"], flat)["score"] == 0
    assert benchmarks.ties_score(["tied:0"], answers[:1])["score"] is None


def test_reward_bench_2_is_the_mean_of_its_subsets():
    names = ["Factuality", "Precise IF", "Math", "Safety", "Focus"]
    rows = [candidates(1, "abcd")] * 5 + [candidates(right, "abc") for _, right in TIES.values()]
    # won; lost; won; one half of a tie; one quarter
    scores = [[3, 1, 2, 0], [0, 1, 0, 0], [9, 1, 1, 1], [2, 2, 0, 0], [1, 1, 1, 1]]
    scores += [row for row, _ in TIES.values()]
    rows[5:] = [candidates(right, "abc"[: len(row)]) for row, right in TIES.values()]
    by, ids = names + ["Ties"] * 4, [str(i) for i in range(5)] + list(TIES)
    chapter, _ = reward_measures.measure(
        opened(rows, by=by, benchmark="RewardBench 2", ids=ids), answer_scores(scores)
    )
    found = chapter["benchmark"]
    values = [section["value"] for section in found["sections"].values()]
    ties = benchmarks.ties_score(list(TIES), [(np.array(s), n) for s, n in TIES.values()])["score"]
    assert values == [1, 0, 1, 0.5, 0.25, ties] and not found["missing"]
    assert found["score"]["value"] == pytest.approx((2.75 + ties) / 6)


@pytest.mark.parametrize(
    ("subsets", "several", "name"),
    [
        (["hep-go", "donotanswer"], False, "RewardBench"),
        (["hep-go", "mine"], False, None),
        (["Math", "Ties"], True, "RewardBench 2"),
        (["Math", "Safety"], False, None),  # somebody's own pairs
        ([], True, None),
    ],
)
def test_a_benchmark_is_known_by_its_subsets(subsets, several, name):
    assert benchmarks.name_of(subsets, several) == name


def estimate(value, low, high):
    return {"value": value, "interval": [low, high], "n": 9, "method": "m"}


@pytest.mark.parametrize(
    ("accuracy", "over_longer", "over_words", "word"),
    [
        ((0.8, 0.7, 0.9), (0.2, 0.1, 0.3), (0.1, 0.01, 0.2), "better"),
        ((0.8, 0.7, 0.9), (0.2, 0.1, 0.3), (0.1, -0.01, 0.2), "unclear"),
        ((0.8, 0.7, 0.9), (0.2, 0.1, 0.3), (-0.2, -0.3, -0.1), "worse"),
        ((0.55, 0.5, 0.6), (0.2, 0.1, 0.3), (0.1, 0.01, 0.2), "chance"),
    ],
)
def test_verdict(accuracy, over_longer, over_words, word):
    section = {
        "rows": 9,
        "pairs": 9,
        "chance": 0.5,
        "model": {
            "rewards/accuracies": estimate(*accuracy),
            "rewards/accuracies_ties_lost": estimate(*accuracy),
        },
        "length_correlation": estimate(0.5, 0.4, 0.6),
        "score_length_correlation": estimate(0.3, 0.2, 0.4),
    }
    rules = {
        "longer_wins": estimate(0.6, 0.5, 0.7),
        "bag_of_words": estimate(0.7, 0.6, 0.8),
        "model_minus_longer_wins": estimate(*over_longer),
        "model_minus_bag_of_words": estimate(*over_words),
    }
    reached = reward_measures.verdict({"preferences": section, "baselines": rules})
    assert reached["word"] == word and word in reward_measures.WORDS
    reasons = " ".join(reached["reasons"])
    assert "a bag of words is right on 70.0%" in reasons and "0.3 [0.2, 0.4]" in reasons


GROUPS = [
    Group((5, 6, 7), ((8, 9, 10), (11, 12, 13, 14, 15, 16), (17,))),
    Group((20, 21), ((22, 23, 24), (25,))),
    Group(tuple(range(30, 50)), ((50, 51), (52, 53, 54))),
]


def alone(lm, groups):
    """Each prompt with each of its responses by itself through the class, in fp64."""
    exact = lm.double()
    with torch.no_grad():
        found = [
            float(exact(input_ids=torch.tensor([[*group.prompt, *response]])).logits)
            for group in groups
            for response in group.responses
        ]
    lm.float()
    return found


@pytest.mark.parametrize("pad", [0, None])
def test_right_padded_scores_are_those_of_each_sequence_alone(pad):
    """Whatever is computed at once: a class without pad token takes one sequence, and gets one."""
    lm = tiny.make_score_model("qwen2")
    lm.config.pad_token_id = pad
    own = OwnClass(lm, batch_tokens=40, autocast=None)
    scores = own(pack(GROUPS))
    assert scores.tolist() == pytest.approx(alone(lm, GROUPS), abs=2e-5)
    lengths = [len(g.prompt) + len(r) for g in GROUPS for r in g.responses]
    parts = own.parts(lengths)
    assert sorted(i for part in parts for i in part) == list(range(7))
    assert all(len(p) * max(lengths[i] for i in p) <= 40 for p in parts)
    assert max(map(len, parts)) == (1 if pad is None else 4)


def test_where_a_class_reads_its_score():
    lm = tiny.make_score_model("llama")  # pad is 2, and so is the end token
    own = OwnClass(lm, batch_tokens=64, autocast=None)
    assert own.reads_last(torch.tensor([5, 6, 7])) is True
    assert own.reads_last(torch.tensor([5, 6, 2])) is False
    del lm.score  # a class that shows no score of each token
    lm.classifier = torch.nn.Linear(1, 1)
    assert own.reads_last(torch.tensor([5, 6, 7])) is None


def test_batches_that_differ_from_single_sequences_are_refused():
    alike = torch.tensor([0.5, -0.5])
    judges.check_alike(alike + 5e-5, alike, "fp32", "packed")
    with pytest.raises(judges.CheckFailed, match="--layout padded"):
        judges.check_alike(alike + 5e-4, alike, "fp32", "packed")
    with pytest.raises(judges.CheckFailed, match="not finite"):
        judges.check_alike(alike, alike * math.nan, "fp32", "padded")


def test_scores_that_are_not_finite_end_the_run(capsys):
    """They would count as lost."""
    data = generations.as_data([(1, 2)] * 3, [(3,)] * 3, [0, 1, 2])
    data = dataclasses.replace(data, starts=(("rows.jsonl", 0),))
    judges.refuse_not_finite([np.array([0.5, 1.0])] * 3, data)
    with pytest.raises(SystemExit) as ended:
        judges.refuse_not_finite([np.ones(2), np.array([0.5, math.nan]), np.ones(2)], data)
    assert ended.value.code == 5
    assert "1 of 3 rows" in (said := capsys.readouterr().err) and "rows.jsonl row 1" in said
