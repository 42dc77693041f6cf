"""What is measured of generated text, against brute force, scipy, exact divergences and other
numbers of ranks.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import tiny
import torch
import transformers

from eval import generations
from eval.generations import Decoding, answer, compare, kl, prompts_of
from tests.eval.generations_worker import compared, models, prompts
from train.data.tokens import prepare
from train.methods.answers import distinct, repetition, win_rate
from train.methods.rewards import Prompt, RewardModel
from train.models.generate import Completion, generate

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
ASK = [{"role": "user", "content": "What now?"}]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tiny.save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def judge_dir(tmp_path_factory):
    """A tiny reward model with a pad token of its own."""
    folder = tmp_path_factory.mktemp("judge")
    torch.manual_seed(3)
    fields = tiny.make_model().config.to_dict() | {"num_labels": 1, "pad_token_id": 0}
    config = transformers.LlamaConfig(**fields)
    transformers.LlamaForSequenceClassification(config).save_pretrained(folder)
    tiny.save_tokenizer(folder)
    return folder


def alone(lm, prompt, answer):
    """(R,) log-probabilities of an answer's tokens, the plain way, fp32 logits."""
    ids = torch.tensor([[*prompt, *answer]])
    with torch.no_grad():
        logps = torch.log_softmax(lm(ids, use_cache=False).logits[0].double(), -1)
    return logps[len(prompt) - 1 : -1].gather(1, ids[0, len(prompt) :, None]).squeeze(1)


def plain(live):
    """The same weights in a model that nobody packs."""
    lm = tiny.make_model()
    lm.load_state_dict(live.module.lm.state_dict())
    return lm


def test_compare_measures_what_the_models_write(tokenizer, judge_dir):
    """Every column of every row again from the plain loop, the plain forward and plain counting;
    then the means.
    """
    model, reference = models()
    asked, judge = prompts(), RewardModel(judge_dir, CPU)
    decoding = Decoding(max_new_tokens=12, batch_size=4)
    found = compare(compared(model, reference, judge), asked, tokenizer, decoding)
    assert [row["row"] for row in found.rows] == [p.row for p in asked]
    assert found.rows[3]["prompt"] == "question 3"
    lms = {"model": plain(model), "reference": plain(reference)}
    for mode, temperature in (("greedy", 0.0), ("sampled", 1.0)):
        for side, lm in lms.items():
            measured = found.report[mode][side]
            answers = generate(
                lm,
                [p.ids for p in asked],
                eos_token_ids=[2],
                max_new_tokens=12,
                temperature=temperature,
                prompt_numbers=[p.row for p in asked],
                batch_size=1,
            )
            columns = {
                key.removeprefix(f"{mode}/{side}/"): [row[key] for row in found.rows]
                for key in found.rows[0]
                if key.startswith(f"{mode}/{side}/")
            }
            ids = [list(a.ids[: len(a.ids) - a.ended]) for a in answers]
            assert columns["length"] == list(map(len, ids))
            assert columns["text"] == [
                tokenizer.decode(each, skip_special_tokens=True) for each in ids
            ]
            assert measured["length"]["value"] == pytest.approx(np.mean(columns["length"]))
            assert measured["length"]["n"] == len(asked)
            assert measured["ended"]["value"] == pytest.approx(np.mean([a.ended for a in answers]))
            scores = [
                _judged(judge, p.messages, text, a.ended)
                for p, text, a in zip(asked, columns["text"], answers, strict=True)
            ]
            assert columns["reward"] == pytest.approx(scores, abs=1e-5)
            if (mode, side) == ("sampled", "model"):
                gaps = [
                    alone(lms["model"], p.ids, a.ids) - alone(lms["reference"], p.ids, a.ids)
                    for p, a in zip(asked, answers, strict=True)
                ]
                k1 = [float(gap.sum()) for gap in gaps]
                k3 = [float((gap + (-gap).exp() - 1).sum()) for gap in gaps]
                assert columns["kl_k1"] == pytest.approx(k1, abs=1e-4)
                assert columns["kl_k3"] == pytest.approx(k3, abs=1e-4)
                per_token = float(sum(gap.sum() for gap in gaps)) / sum(len(gap) for gap in gaps)
                assert measured["kl_k1_per_token"]["value"] == pytest.approx(per_token, abs=1e-5)
            else:
                assert "kl_k1" not in measured and f"{mode}/{side}/kl_k1" not in found.rows[0]
        pair = [[row[f"{mode}/{side}/reward"] for row in found.rows] for side in lms]
        won = np.mean([(a > b) + 0.5 * (a == b) for a, b in zip(*pair, strict=True)])
        assert found.report[mode]["win_rate"]["value"] == pytest.approx(won)
        for name in ("reward", "length", "ended", "repetition"):
            sides = [[row[f"{mode}/{side}/{name}"] for row in found.rows] for side in lms]
            change = found.report[mode]["change"][name]["value"]
            assert change == pytest.approx(np.mean(np.subtract(*sides)))
    assert found.report["examples"] == found.rows[:3]
    assert found.values["sampled/model/length"].tolist() == [
        row["sampled/model/length"] for row in found.rows
    ]


def test_a_model_beside_itself_has_changed_nothing(tokenizer):
    model, _ = models()
    found = compare(compared(model, model), prompts(), tokenizer, Decoding(max_new_tokens=8))
    for mode in ("greedy", "sampled"):
        assert found.report[mode]["unchanged"]["value"] == 1
        assert found.report[mode]["model"]["length"] == found.report[mode]["reference"]["length"]
    sampled = found.report["sampled"]["model"]
    assert sampled["kl_k1"]["value"] == sampled["kl_k3"]["value"] == 0
    at_half = Decoding(max_new_tokens=2, temperature=0.5)
    cool = compare(compared(model, model), prompts(), tokenizer, at_half)
    # it would be another distribution's
    assert not any("kl" in name for name in cool.report["sampled"]["model"])
    alone = compare(compared(model, None), prompts(), tokenizer, Decoding(max_new_tokens=8))
    assert set(alone.report["greedy"]) == {"model"}
    assert "kl_k1" not in alone.report["sampled"]["model"]
    assert alone.report["sampled"]["model"]["length"] == found.report["sampled"]["model"]["length"]


def test_divergence_is_the_exact_one_on_average():
    """One token after one prompt, 4,000 times: both estimators against the sum of p log(p / q) over
    the vocabulary.
    """
    model, reference = models()
    asked = [Prompt(i, (5, 77, 301), ASK) for i in range(4000)]
    answers = answer(model.module, asked, {2}, Decoding(max_new_tokens=1, batch_size=500), "")
    columns = kl(compared(model, reference, batch_tokens=4096), asked, answers)
    ids = torch.tensor([asked[0].ids])
    with torch.no_grad():
        p, q = (
            torch.log_softmax(plain(live)(ids).logits[0, -1].double(), 0)
            for live in (model, reference)
        )
    exact = float((p.exp() * (p - q)).sum())
    assert exact > 0.01
    for name in ("kl_k1", "kl_k3"):
        values = np.array(columns[name])
        assert abs(values.mean() - exact) < 4 * values.std() / len(values) ** 0.5, name
    assert np.std(columns["kl_k3"]) < np.std(columns["kl_k1"]) and min(columns["kl_k3"]) >= 0


def test_one_rank_and_two_write_the_same_report(tmp_path, tokenizer):
    """To the last digit: batches are planned for the job, and answers are summed up in the data's
    order.
    """
    out = tmp_path / "two"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", "2", "tests/eval/generations_worker.py"]
    done = subprocess.run(
        [*command, str(out)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        decoding = Decoding(max_new_tokens=12, batch_size=4)
        one = compare(compared(*models()), prompts(), tokenizer, decoding)
    finally:
        torch.set_num_threads(threads)
    assert json.loads(out.read_text()) == json.loads(json.dumps([one.report, one.rows]))
    assert one.report["sampled"]["model"]["kl_k1"]["value"] != 0 and len(one.rows) == 9


def test_repetition_and_distinct_by_hand():
    # 1234 2341 3412 4123 1234: 4 kinds of 5
    assert repetition((1, 2, 3, 4, 1, 2, 3, 4)) == pytest.approx(1 - 4 / 5)
    assert repetition((7,) * 9) == pytest.approx(5 / 6)
    assert repetition(range(30)) == 0 and repetition((1, 1, 1)) == 0
    # tokens: 1 2 1 | 2 3 | 4 -> 4 kinds of 6; pairs: 12 21 | 23 -> 3 of 3
    answers = [(1, 2, 1), (2, 3), (4,)]
    assert distinct(answers, 1)["value"] == pytest.approx(4 / 6)
    assert distinct(answers, 2)["value"] == 1
    assert np.isnan(distinct([(), ()], 1)["value"])
    one_answer = {"value": 0.5, "interval": None, "n": 1, "method": "none: one answer"}
    assert distinct([(1, 1)], 1) == one_answer


def test_interval_of_distinct_is_the_jackknife():
    rng = np.random.default_rng(0)
    answers = [tuple(rng.zipf(1.5, rng.integers(1, 30)).clip(0, 200).tolist()) for _ in range(40)]

    def count(some, n):
        grams = [a[i : i + n] for a in some for i in range(len(a) - n + 1)]
        return len(set(grams)) / len(grams)

    for n in (1, 2):
        without_one = [count(answers[:i] + answers[i + 1 :], n) for i in range(len(answers))]
        variance = 39 / 40 * np.sum((np.array(without_one) - np.mean(without_one)) ** 2)
        half = 1.959964 * variance**0.5
        found, value = distinct(answers, n), count(answers, n)
        assert found["value"] == pytest.approx(value)
        assert found["interval"] == pytest.approx([value - half, value + half])


def test_win_rate_has_wilsons_interval():
    found = win_rate([1.0, 2.0, 0.5, 0.1, -1.0, -2.0, 3.0, 1.5])
    expected = scipy.stats.binomtest(6, 8).proportion_ci(method="wilson")
    assert found["value"] == 0.75
    assert found["interval"] == pytest.approx([expected.low, expected.high], abs=1e-6)
    assert win_rate([0.0, 0.0, 1.0, -1.0])["value"] == 0.5


def test_end_tokens_are_those_of_template_tokenizer_and_model(tokenizer):
    lm = tiny.make_model()
    lm.generation_config.eos_token_id = [0, 7]
    assert generations.ends_of(tokenizer, lm) == {0, 2, 7}
    lm.generation_config.eos_token_id = None
    assert generations.ends_of(tokenizer, lm) == {2}


def test_prompts_are_the_first_of_each_kind(tokenizer, tmp_path):
    rows = ["a x y", "b x y", " x y", "a z y", "c x y", "b v w"]  # prompt, chosen, rejected
    file = tmp_path / "pairs.jsonl"
    with file.open("w") as lines:
        for row in rows:
            pair = dict(zip(("prompt", "chosen", "rejected"), row.split(" "), strict=True))
            lines.write(json.dumps(pair) + "\n")
    data = prepare([str(file)], tokenizer, max_length=64, max_dropped=0.5, cache_dir=tmp_path)
    found = prompts_of([str(file)], data)
    assert [(p.row, p.messages[-1]["content"]) for p in found] == [(0, "a"), (1, "b"), (4, "c")]
    assert tokenizer.decode(list(found[2].ids)).endswith(
        "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n"
    )
    assert prompts_of([str(file)], data, 2) == found[:2]
    assert [p.row for p in prompts_of([str(file)], data.select([2, 3]))] == [3, 4]


def _judged(judge, messages, text, ended):
    """The reward from the body's hidden state at the text's last token, through transformers'
    template alone.
    """
    rendered = judge.tokenizer.apply_chat_template(
        [*messages, {"role": "assistant", "content": text}], tokenize=False
    )
    ids = judge.tokenizer(rendered, add_special_tokens=False)["input_ids"]
    ids = ids if ended else ids[:-2]  # the end token and the newline
    with torch.no_grad():
        hidden = judge.model.model(torch.tensor([ids])).last_hidden_state  # (1, tokens, width)
        return float(hidden[0, -1] @ judge.model.score.weight[0])


def test_reward_is_read_off_the_last_token(judge_dir):
    judge = RewardModel(judge_dir, CPU)
    texts, ended = ["Fine, thanks.", "Fine, th", "", "Long " * 30], [True, False, True, True]
    found = judge.score([ASK] * 4, texts, ended)
    for i in (0, 1, 3):
        assert found[i] == pytest.approx(_judged(judge, ASK, texts[i], ended[i]), abs=1e-5)
    assert np.isfinite(found[2]) and len(set(found.tolist())) == 4
    newline = judge.tokenizer.tokenize("\n")[0]  # the template writes one behind <|im_end|>
    assert judge.description == {"name": judge_dir.name, "reads": newline}
    assert judge.score([ASK], texts[3:], ended[3:])[0] == found[3]
    finished = judge.ids(ASK, "Fine", True)
    assert finished[-2] == 2 and judge.ids(ASK, "Fine", False) == finished[:-2]
    assert judge.ids(ASK, " ", True)[-2:] == finished[-2:]
    # where texts end in the pad token the class passes over it, and the report says so
    judge.model.config.pad_token_id = finished[-1]
    assert judge.description["reads"] == "<|im_end|>"


def test_a_conversation_too_long_for_the_reward_model_is_refused(judge_dir):
    judge = RewardModel(judge_dir, CPU)
    asked = [Prompt(0, (1,), ASK), Prompt(1, (1,), [{"role": "user", "content": "word " * 60}])]
    longest = len(judge.ids(asked[1].messages, "", True)) - 1  # the end token is a new one
    judge.check(asked, 512 - longest)
    problem = f"a prompt of {longest} tokens and {513 - longest} new ones exceed the 512"
    with pytest.raises(ValueError, match=problem):
        judge.check(asked, 513 - longest)


def test_no_reward_model_is_refused_with_its_reason(model_dir, judge_dir, tmp_path):
    with pytest.raises(ValueError, match="is no reward model: it has no score.weight"):
        RewardModel(model_dir, CPU)  # a causal model: transformers would draw a head at random
    with pytest.raises(ValueError, match="there is no folder .*nowhere"):
        RewardModel(tmp_path / "nowhere", CPU)
    fields = transformers.AutoConfig.from_pretrained(judge_dir).to_dict() | {"num_labels": 3}
    config = transformers.LlamaConfig(**fields)
    transformers.LlamaForSequenceClassification(config).save_pretrained(tmp_path / "three")
    with pytest.raises(ValueError, match="it has 3 outputs"):
        RewardModel(tmp_path / "three", CPU)


def test_answers_come_back_in_the_order_of_the_prompts():
    model, _ = models()
    asked = prompts()
    found = answer(model.module, asked, {2}, Decoding(max_new_tokens=6, batch_size=2), "")
    expected = [
        generate(
            plain(model), [p.ids], eos_token_ids=[2], max_new_tokens=6, prompt_numbers=[p.row]
        )[0]
        for p in asked
    ]
    assert found == expected and all(isinstance(answer, Completion) for answer in found)


def test_answers_are_told_without_control_tokens(tokenizer):
    """Token 1 opens a turn and 2 ends it: neither is text, the first counts as a token, the last
    does not.
    """
    answers = [Completion((1, 300, 2), ended=True), Completion((300, 301), ended=False)]
    columns = generations.columns_of(answers, [], tokenizer, reward_model=None)
    assert columns["text"] == [tokenizer.decode([300]), tokenizer.decode([300, 301])]
    assert columns["length"] == [2, 2] and columns["ended"] == [1.0, 0.0]
    assert columns["repetition"] == [0.0, 0.0]
