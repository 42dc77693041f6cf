"""Preferences, distribution, baselines and verdict on cases small enough to work out by hand."""

import importlib.metadata
import math
import sys

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics
import torch

from eval import baselines, board, distribution, generations, measures, output, preferences
from eval.scores import Scores, score_all
from eval.verdict import verdict
from tests.launch.commands import ROOT
from train.losses import composition

LOSS = composition.choose("sigmoid", 0.5, {})


def scores(model, lengths, reference=None, prompts=None, tokens=None):
    """Scores of the groups' log-probabilities, (N, k), under the model and perhaps the reference."""
    sums = np.array([model] if reference is None else [model, reference], dtype=float)
    if tokens is None:
        tokens = np.zeros((len(sums), np.sum(lengths)))
    rows = np.arange(sums.shape[1])
    return Scores(
        rows=rows,
        prompts=rows if prompts is None else np.array(prompts),
        lengths=np.array(lengths),
        sums=sums,
        tokens=np.array(tokens, dtype=np.float32),
    )


FOUR = scores(
    [[-10, -12], [-9, -9], [-8, -4], [-7, -7]],
    [[5, 10], [4, 4], [8, 2], [2, 2]],
    [[-12, -12], [-9, -9], [-7, -5], [-7, -6]],
    prompts=[3, 3, 1, 2],
)


def test_rewards_by_hand():
    section, columns = preferences.measure(FOUR, LOSS)
    # rewards 0.5 x (2, 0, -1, 0) and 0.5 x (0, 0, 1, -1); margins 1, 0, -1, 0.5
    value = {name: estimate["value"] for name, estimate in section["model"].items()}
    assert columns["margin"].tolist() == [1, 0, -1, 0.5]
    assert columns["correct"].tolist() == [1, 0.5, 0, 1]
    assert value["rewards/accuracies"] == 2.5 / 4 and value["rewards/margins"] == 0.125
    assert value["rewards/chosen"] == 0.125 and value["rewards/rejected"] == 0.0
    assert value["chosen_fell"] == 0.25
    losses = [math.log1p(math.exp(-margin)) for margin in (1, 0, -1, 0.5)]
    assert value["loss"] == pytest.approx(np.mean(losses), rel=1e-12)
    assert value["logps/chosen"] == -8.5 and value["logps/chosen_per_token"] == -34 / 19
    assert value["logps/rejected_per_token"] == -32 / 18
    assert value["logps/accuracies"] == (1 + 0.5 + 0 + 0.5) / 4
    # a token: -2 against -1.2; equal; -1 against -2; equal
    assert value["logps/accuracies_per_token"] == (0 + 0.5 + 1 + 0.5) / 4
    assert section["reference"]["logps/margins"]["value"] == (0 + 0 - 2 - 1) / 4
    assert section["prompts"] == 3 and section["model"]["loss"]["prompts"] == 3


def test_a_loss_that_looks_at_a_whole_step_is_told_from_others():
    def is_by_pair(name, **args):
        return preferences.is_by_pair(composition.choose(name, 0.1, args))

    assert is_by_pair("sigmoid") and is_by_pair("ipo") and is_by_pair("sigmoid:0.5,sft:1.0")
    assert not is_by_pair("kto") and not is_by_pair("aot")
    assert not is_by_pair("sigmoid:0.5,bco_pair:0.5")
    assert not is_by_pair("sigmoid", use_weighting=True)
    assert is_by_pair("sigmoid", ld_alpha=0.5)


def test_rewards_that_need_no_reference():
    simpo = composition.choose("simpo", 2.0, {})
    section, columns = preferences.measure(FOUR, simpo)
    # 2 x log-prob a token: -4, -4.5, -2, -7 against -2.4, -4.5, -4, -7
    assert columns["margin"].tolist() == pytest.approx([-1.6, 0, 2, 0])
    value = {name: estimate["value"] for name, estimate in section["model"].items()}
    assert value["rewards/accuracies"] == (0 + 0.5 + 1 + 0.5) / 4
    assert value["rewards/margins"] == pytest.approx(0.1)
    assert value["rewards/chosen"] == pytest.approx(-17.5 / 4) and value["chosen_fell"] == 0.25
    losses = [math.log1p(math.exp(0.5 - margin)) for margin in (-1.6, 0, 2, 0)]
    assert value["loss"] == pytest.approx(np.mean(losses), rel=1e-12)
    assert section["reward"] == "beta x log-prob, mean a token"
    # the reference: -4.8, -4.5, -1.75, -7 against -2.4, -4.5, -5, -6; its margins -2.4, 0, 3.25, -1
    reference = section["reference"]
    assert reference["rewards/margins"]["value"] == pytest.approx(-0.15 / 4)
    assert reference["rewards/accuracies"]["value"] == (0 + 0.5 + 1 + 0) / 4
    # grown by 0.8, 0, -1.25, 1
    assert section["change"]["margins"]["value"] == pytest.approx(0.55 / 4)
    assert section["change"]["accuracies"]["value"] == 2.5 / 4
    alone, columns_alone = preferences.measure(
        FOUR._replace(sums=FOUR.sums[:1], tokens=FOUR.tokens[:1]), simpo
    )
    assert columns_alone["margin"].tolist() == columns["margin"].tolist()
    for name in ("rewards/margins", "loss"):
        assert alone["model"][name] == section["model"][name]
    assert "change" not in alone and "chosen_fell" not in alone["model"]


def test_rewards_of_ld_dpo_are_damped_as_in_training():
    # chosen of 3 tokens, rejected of 1: past the first they count a half
    tokens = [[-1.0, -2, -4, -3], [-1.5, -1, -1, -2]]
    sums = [[[-7.0, -3]], [[-3.5, -2]]]
    pair = scores(sums[0], [[3, 1]], sums[1], tokens=tokens)
    section, columns = preferences.measure(
        pair, composition.choose("sigmoid", 0.5, {"ld_alpha": 0.5})
    )
    chosen = 0.5 * ((-1 - 3) - (-1.5 - 1))
    assert columns["chosen_reward"].tolist() == [chosen]
    assert columns["margin"].tolist() == [chosen - 0.5 * (-3 + 2)]
    assert section["model"]["logps/chosen"]["value"] == -7  # the model's own


def test_displacement_counts_the_pairs_whose_chosen_answer_lost():
    three = scores([[-5, -9], [-6, -9], [-4, -9]], [[2, 2]] * 3, [[-4, -9], [-5, -9], [-4, -9]])
    section, _ = preferences.measure(three, LOSS)
    assert section["model"]["chosen_fell"]["value"] == 2 / 3  # -5 < -4, -6 < -5; -4 has not moved


def test_by_length_and_its_correlation():
    section, _ = preferences.measure(FOUR, LOSS)
    # (chosen - rejected) / longer: -.5, 0, .75, 0
    counts = {row["from"]: row["n"] for row in section["by_length"]}
    assert counts == {-1: 0, -0.5: 1, -0.1: 2, 0.1: 0, 0.5: 1}
    assert [row["from"] for row in section["by_length"]] == sorted(counts)
    assert [row["value"] for row in section["by_length"]][1:3] == [1, 0.75]
    # ranks of length 1, 2.5, 4, 2.5 against ranks of margin 4, 2, 1, 3: Pearson's r of the ranks
    assert section["length_correlation"]["value"] == pytest.approx(
        np.corrcoef([1, 2.5, 4, 2.5], [4, 2, 1, 3])[0, 1]
    )


def test_calibration_of_the_implied_probability():
    section, _ = preferences.measure(FOUR, LOSS)
    calibration = section["calibration"]
    # .731 right, .5 a tie, .731 wrong, .622 right
    sure = [1 / (1 + math.exp(-m)) for m in (1, 0, 1, 0.5)]
    assert calibration["confidence"]["value"] == pytest.approx(np.mean(sure))
    assert [row["n"] for row in calibration["table"]] == [1, 0, 1, 0, 2, 0, 0, 0, 0, 0]
    error = (2 * (sure[0] - 0.5) + 0 + (1 - sure[3])) / 4
    assert calibration["ece"]["value"] == pytest.approx(error)


def test_a_calibrated_model_lies_within_what_chance_shows():
    rng = np.random.default_rng(1)
    margins = rng.normal(0, 1.5, 400)
    right = rng.random(400) < 1 / (1 + np.exp(-np.abs(margins)))
    honest = torch.from_numpy(np.where(right, np.abs(margins), -np.abs(margins)))
    calibration = preferences.calibration(honest, np.arange(400))
    low, high = calibration["ece_if_calibrated"]
    assert low <= calibration["ece"]["value"] <= high
    boastful = preferences.calibration(4 * honest, np.arange(400))
    assert boastful["ece"]["value"] > boastful["ece_if_calibrated"][1]


def test_without_a_reference_margins_are_differences_of_log_probabilities():
    alone = FOUR._replace(sums=FOUR.sums[:1], tokens=FOUR.tokens[:1])
    section, columns = preferences.measure(alone, LOSS)
    assert columns["margin"].tolist() == [2, 0, -4, 0]
    assert "nats" in section["margin"] and section["beta"] is None
    assert all(name.startswith("logps/") for name in section["model"])
    assert section["model"]["logps/margins"]["value"] == -0.5 and "calibration" not in section


def test_distribution_by_hand_and_by_scikit_learn():
    rng = np.random.default_rng(0)
    lengths = np.array([[2, 3], [1, 1], [3, 2]])
    tokens = rng.normal(-2, 1, (2, 12)).astype(np.float32)
    chosen = [0, 1, 5, 7, 8, 9]  # of the 12 tokens: 2, skip 3, 1, skip 1, 3, skip 2
    sums = [
        [[t[0:2].sum(), t[2:5].sum()], [t[5], t[6]], [t[7:10].sum(), t[10:].sum()]]
        for t in tokens.astype(float)
    ]
    pairs = scores(sums[0], lengths, sums[1], tokens=tokens)
    out_tokens = rng.normal(-3, 1, (2, 5)).astype(np.float32)
    texts = scores(
        [[out_tokens[0, :4].sum()], [out_tokens[0, 4]]],
        [[4], [1]],
        [[out_tokens[1, :4].sum()], [out_tokens[1, 4]]],
        tokens=out_tokens,
    )
    section, columns = distribution.measure(pairs, texts, ["model", "reference"])
    for number, name in enumerate(("model", "reference")):
        inside, outside = tokens[number, chosen].astype(float), out_tokens[number]
        of_model = section[name]
        perplexity = of_model["in"]["perplexity"]["value"]
        assert perplexity == pytest.approx(math.exp(-inside.mean()), rel=1e-6)
        mean = of_model["out"]["logp_per_token"]["value"]
        assert mean == pytest.approx(outside.mean(), rel=1e-6)
        labels, values = [1] * 6 + [0] * 5, np.concatenate([inside, outside])
        auroc = sklearn.metrics.roc_auc_score(labels, values)
        assert of_model["by_token"]["auroc"]["value"] == pytest.approx(auroc)
        assert sum(of_model["by_token"]["histogram"]["in"]) == pytest.approx(6)
        assert sum(of_model["by_text"]["histogram"]["out"]) == pytest.approx(2)
    edges = [section[name]["by_token"]["histogram"]["edges"] for name in ("model", "reference")]
    assert edges[0] == edges[1]  # shared bins
    change = section["change"]["out"]
    expected = (texts.sums[0].sum() - texts.sums[1].sum()) / 5
    assert change["logp_per_token"]["value"] == pytest.approx(expected)
    assert change["perplexity_ratio"]["value"] == pytest.approx(math.exp(-expected))
    low, high = section["model"]["in"]["perplexity"]["interval"]
    assert low <= section["model"]["in"]["perplexity"]["value"] <= high
    assert columns["logp"].tolist() == texts.sums[0, :, 0].tolist()


def test_shared_edges_hold_all_and_do_not_follow_rounding():
    values = np.random.default_rng(0).normal(-3, 1, (2, 500))
    edges = distribution.shared_edges(values, values - 1)
    assert edges[0] <= values.min() - 1 and edges[-1] > values.max()
    assert np.array_equal(edges, distribution.shared_edges(values + 1e-7, values - 1 - 1e-7))


def test_bins_follow_the_bulk_of_the_narrower_sample():
    """Freedman and Diaconis: 2 IQR / n^(1/3); of 64 normal values of spread 0.3 that is 2 x 0.405 /
    4 = 0.2.
    """
    rng = np.random.default_rng(0)
    quantiles = scipy.stats.norm.ppf((np.arange(64) + 0.5) / 64)
    narrow, wide = -2 + 0.3 * quantiles[None], rng.normal(-3, 1, (1, 500))

    def width(*samples):
        return float(np.diff(distribution.shared_edges(*samples)).mean())

    assert width(narrow, wide) == pytest.approx(0.2)
    # one value far out changes nothing
    assert width(narrow, np.append(wide, [[-12.0]], 1)) == pytest.approx(0.2)
    assert width(1e-4 * narrow) == pytest.approx(2e-5) and width(1e3 * narrow) == pytest.approx(200)
    assert len(distribution.shared_edges(narrow, np.array([[-1e4]]))) <= distribution.MOST_BINS + 2
    assert distribution.shared_edges(np.zeros((2, 9))).tolist() == [0, 1]  # all alike: one bin
    # a token that is certain: 0, or a rounding error below it, in the same last bin
    certain, rounded = (np.array([[-3.0, -1.2, -0.6, top]]) for top in (0.0, -1e-7))
    assert np.array_equal(distribution.shared_edges(certain), distribution.shared_edges(rounded))
    apart = (np.array([[3.0]]), np.array([[-0.0004]]))
    alike = (np.full((1, 5), -2.5),)
    for samples in ((narrow, wide), apart, alike):
        edges = distribution.shared_edges(*samples)
        assert edges[0] <= min(x.min() for x in samples)
        assert max(x.max() for x in samples) <= edges[-1]
        assert (np.diff(edges) > 0).all()


def test_what_chance_shows_of_alike_samples():
    rng = np.random.default_rng(0)
    a, b = (torch.from_numpy(rng.normal(0, 1, n)) for n in (60, 50))
    bins = torch.linspace(-4, 4, 9, dtype=torch.float64)
    low, high = distribution.range_if_alike(a, b, bins)["overlap"]

    def histogram(n):
        return measures.histogram(torch.from_numpy(rng.normal(0, 1, n)), bins)

    overlaps = [float(measures.overlap(histogram(60), histogram(50))) for _ in range(300)]
    assert np.mean([low <= overlap <= high for overlap in overlaps]) > 0.85


def test_bag_of_words_learns_a_rule_and_no_noise():
    rng = np.random.default_rng(0)
    warm, cold = "kitchen soup rain garden laugh".split(), "policy form report item office".split()
    chosen = [" ".join(rng.choice(warm, 6)) for _ in range(80)]
    rejected = [" ".join(rng.choice(cold, 6)) for _ in range(80)]
    assert (baselines.bag_of_words(chosen, rejected, np.arange(80)) > 0).all()
    flip = rng.random(80) < 0.5
    mixed = [(b, a) if f else (a, b) for a, b, f in zip(chosen, rejected, flip, strict=True)]
    wins = baselines.bag_of_words([a for a, _ in mixed], [b for _, b in mixed], np.arange(80)) > 0
    assert 0.25 < wins.mean() < 0.75


def test_bag_of_words_never_sees_the_prompt_that_it_is_scored_on():
    """Every pair stands four times and its labels are noise: who saw a copy knows the answer, who
    did not guesses.
    """
    rng = np.random.default_rng(0)
    texts = [(f"word{i} other{i}", f"thing{i} else{i}") for i in range(60)]
    pairs = [pair if rng.random() < 0.5 else pair[::-1] for pair in texts for _ in [0]]
    chosen, rejected = ([pair[side] for pair in pairs for _ in range(4)] for side in (0, 1))
    by_prompt = baselines.bag_of_words(chosen, rejected, np.repeat(np.arange(60), 4))
    by_row = baselines.bag_of_words(chosen, rejected, np.arange(240))
    assert (by_prompt == 0).all()  # no known word in the other folds
    assert (by_row > 0).all()  # every word known


def test_longer_wins_counts_ties_half_and_one_prompt_fits_nothing():
    section, columns = baselines.measure(
        ["aaa", "b", "cc"], ["a", "bb", "dd"], np.zeros(3, dtype=int), np.ones(3)
    )
    assert section["longer_wins"]["value"] == 0.5 and section["bag_of_words"]["value"] is None
    assert columns == {}


def test_model_against_bag_of_words():
    texts = [(f"soup garden {i}", f"form office {i}") for i in range(10)]
    chosen, rejected = zip(*texts, strict=True)
    section, _ = baselines.measure(chosen, rejected, np.arange(10), np.full(10, 0.5))
    assert section["bag_of_words"]["value"] == 1
    assert section["model_minus_bag_of_words"]["value"] == -0.5


def estimate(value, low, high):
    return {"value": value, "interval": [low, high], "n": 9, "method": "m"}


FINE, CHANCE, SAME = (0.8, 0.7, 0.9), (0.5, 0.4, 0.6), (1.0, 0.99, 1.01)


@pytest.mark.parametrize(
    ("accuracy", "margin", "ratio", "won", "word"),
    [
        (FINE, (1, 0.5, 1.5), SAME, None, "better"),
        (FINE, (1, 0.5, 1.5), (0.9, 0.85, 0.95), CHANCE, "better"),
        # the gain has a price: other text is less likely, the reward model likes the answers less
        (FINE, (1, 0.5, 1.5), (1.3, 1.2, 1.4), None, "different"),
        (FINE, (1, 0.5, 1.5), SAME, (0.3, 0.2, 0.4), "different"),
        (FINE, (1, -0.5, 1.5), SAME, FINE, "different"),  # the margin is not shown
        ((0.3, 0.2, 0.4), (-1, -1.5, -0.5), SAME, FINE, "worse"),
        (CHANCE, (0, -0.5, 0.5), (1.3, 1.2, 1.4), None, "worse"),
        (CHANCE, (0, -0.5, 0.5), SAME, (0.3, 0.2, 0.4), "worse"),
    ],
)
def test_verdict(accuracy, margin, ratio, won, word):
    model = {
        "rewards/accuracies": estimate(*accuracy),
        "rewards/margins": estimate(*margin),
        "chosen_fell": estimate(0.1, 0, 0.2),
    }
    trivial = {
        "bag_of_words": estimate(1.0, 0.9, 1),
        "longer_wins": estimate(0.5, 0.4, 0.6),
        "model_minus_bag_of_words": estimate(-0.125, -0.25, 0),
    }
    text = {"change": {"out": {"perplexity_ratio": estimate(*ratio)}}}
    change = {
        "length": estimate(-7.5, -9, -6),
        "ended": estimate(0.25, 0, 0.5),
        "repetition": estimate(0.01, 0, 0.02),
    }
    written = {"sampled": {"model": {"kl_k3": estimate(1.5, 1, 2)}, "change": change}}
    if won:
        written["sampled"]["win_rate"] = estimate(*won)
    preferred = {"model": model}
    reached = verdict(preferred, trivial, text, written, unchanged=False)
    reasons = " ".join(reached["reasons"])
    assert reached["word"] == word
    assert "right on 100.0%" in reasons and "-12.5% [-25.0%, 0.0%]" in reasons
    assert "by -7.5 [-9, -6] tokens" in reasons and "1.5 [1, 2] nats" in reasons
    assert ("reward model" in reasons) == bool(won)
    # rewards that are not relative to the reference say nothing against it: what they grew by does
    grown = {"accuracies": estimate(*accuracy), "margins": estimate(*margin)}
    other = {
        "rewards/accuracies": estimate(0.9, 0.8, 1),
        "rewards/margins": estimate(-3, -4, -2),
        "chosen_fell": estimate(0.1, 0, 0.2),
    }
    absolute = {"model": other, "reference": other, "change": grown}
    assert verdict(absolute, trivial, text, written, unchanged=False)["word"] == word
    assert verdict(preferred, trivial, text, {}, unchanged=True)["word"] == "unchanged"
    assert verdict(preferred, trivial, {}, {}, unchanged=False)["word"] == "not compared"


def test_content_has_no_nan_and_plain_numbers():
    content = {"a": [np.float64(1.5), math.nan, (np.int64(2),)], "b": math.inf}
    assert output.plain(content) == {"a": [1.5, None, [2]], "b": None}


def test_curves_rank_the_values_wherever_they_lie():
    """TensorBoard's thresholds lie 1/127 apart: log-probabilities a token near e^-9 would all fall
    below the first.
    """
    values = {
        "margins": np.array([0.001, 0.002, -0.001]),
        "model/logp_per_token_in": np.array([-9.1, -9.2]),
        "model/logp_per_token_out": np.array([-9.3, -9.15]),
    }
    curves = board.curves(values)
    labels, chances = curves["in_or_out/model"]
    assert labels.tolist() == [1, 1, 0, 0] and chances.tolist() == [1, 0.5, 0.25, 0.75]
    labels, chances = curves["chosen_or_rejected"]
    auroc = sklearn.metrics.roc_auc_score(
        [1] * 3 + [0] * 3, [0.001, 0.002, -0.001, -0.001, -0.002, 0.001]
    )
    assert sklearn.metrics.roc_auc_score(labels, chances) == pytest.approx(auroc)
    assert set(curves) == {"in_or_out/model", "chosen_or_rejected"}


def test_out_of_memory_ends_with_advice(capsys):
    """A model that runs out of memory in a batch, as torch says it on CUDA and on a CPU."""
    data = generations.as_data([(1, 2)], [(3, 4)], [0])

    def too_large_for_cuda(batch):
        raise torch.OutOfMemoryError("CUDA out of memory")

    def too_large_for_cpu(batch):
        raise RuntimeError(
            "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
        )

    for model in (too_large_for_cuda, too_large_for_cpu):
        with pytest.raises(SystemExit) as ended:
            score_all(data, [model], 64, torch.device("cpu"), "rows")
        assert ended.value.code == 1
        line = "out of memory in a batch of 4 tokens (--micro_tokens is 64: lower it"
        assert line in capsys.readouterr().err


def test_no_chapter_hides_a_library():
    """Python puts the folder of the script that it runs first on its path: from there an eval/json.py
    would be everybody's json.
    """
    installed = {*sys.stdlib_module_names, *importlib.metadata.packages_distributions()}
    assert {"statistics", "tensorboard"} <= installed
    assert not installed & {path.stem for path in (ROOT / "eval").glob("[!_]*.py")}
