"""Rewards that a program gives."""

import asyncio
import functools
import sys
import time
from fractions import Fraction
from types import ModuleType

import numpy as np
import pytest
import torch

from train.data.errors import DataError
from train.methods import reward_functions as rewards
from train.methods.reward_functions import Sample


def sample(response, ended=True, **row):
    return Sample([{"role": "user", "content": "ask"}], response, ended, row, 7)


def value(spec, response, ended=True, **row):
    source = rewards.open_source(spec, [*row])
    return float(rewards.score(source, [sample(response, ended, **row)])[0])


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("2 + 2 = 4.", 4),
        ("it costs 1,234.50 in all", Fraction(2469, 2)),
        ("50%", Fraction(1, 2)),
        ("3/4 of it", Fraction(3, 4)),
        (r"so \boxed{7}, not 8", 7),
        ("10-12", 12),
        ("it is -12", -12),
        ("1e3", 1000),
        ("1/0", None),
        ("none", None),
        (r"so \boxed{\frac{3}{4}}", Fraction(3, 4)),
        (r"\boxed{-\dfrac12} of 9", Fraction(-1, 2)),
        (r"\boxed{2\frac{1}{2}}", Fraction(5, 2)),
        (r"\boxed{\text{7 apples}}, not 8", 7),
        (r"\boxed{3}, or \boxed{4", 3),  # cut within its braces
        (r"\boxed{1{,}000}", 1000),
        (r"\boxed{12\,000}", 12000),
        (r"\boxed{50\%}", Fraction(1, 2)),
        ("\u22125", -5),
        (r"a loss of -\$5.50", Fraction(-11, 2)),
        ("on 2024/05/06", 6),
        ("type5", 5),
        ("1e-3", Fraction(1, 1000)),
    ],
)
def test_the_last_number(text, number):
    assert rewards.last_number(text) == number


@pytest.mark.parametrize("text", ["1e99999999", "-1e-99999999", "9" * 5000, r"\boxed{" * 9000])
def test_no_answer_holds_a_run_up(text):
    """A power of ten written out would take minutes; what takes no time at all has some here."""
    began = time.perf_counter()
    assert rewards.last_number(text) is None
    assert time.perf_counter() - began < 1


@pytest.mark.parametrize(
    ("spec", "response", "row", "wanted"),
    [
        ("regex:^yes", "yes, sir", {}, 1),
        ("regex:^yes", "no", {}, 0),
        ("exact:answer", " The  Pier ", {"answer": "the pier"}, 1),
        ("exact:answer", "a pier", {"answer": "the pier"}, 0),
        ("exact:answer", "a pier", {"answer": None}, np.nan),
        ("exact:answer", "", {"answer": " "}, np.nan),
        ("number:answer", "so it is 1,000.", {"answer": "#### 1000"}, 1),
        ("number:answer", "so it is 999", {"answer": 1000}, 0),
        ("number:answer", "none", {"answer": 1000}, 0),
        ("number:answer", "3", {"answer": "x"}, np.nan),
        ("length:4-6", "one two three four", {}, 1),
        ("length:4-6", "one two", {}, 0.5),
        ("length:4-6", "a " * 9, {}, 0.5),
        ("length:4-6", "a " * 99, {}, 0),
        ("json", '```json\n{"a": 1}\n```', {}, 1),
        ("json", "{a: 1}", {}, 0),
        ("repetition", "a b c d e", {}, 0),
        ("repetition", "a b c a b c", {}, -0.25),
        ("repetition", "a b", {}, 0),
    ],
)
def test_verifiers(spec, response, row, wanted):
    assert value(spec, response, **row) == pytest.approx(wanted, nan_ok=True)


def test_overlong_is_dapo_s_punishment():
    """OpenRLHF's apply_overlong_penalty gives the same: 16 tokens at most, a buffer of 4."""
    lengths = [10, 12, 13, 14, 16]
    source = rewards.open_source("overlong:4", [])
    answers = [sample("x")._replace(ids=(5,) * length, most=16) for length in lengths]
    assert rewards.score(source, answers).tolist() == [0, 0, -0.25, -0.5, -1]


def test_ended():
    assert value("ended", "x") == 1 and value("ended", "x", ended=False) == 0


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("regex", "expected regex:PATTERN"),
        ("ended:now", "expected ended"),
        ("length:9-3", "expected words as LO-HI"),
        ("overlong:0", "expected tokens, say overlong:64"),
        ("number:answer", "no column 'answer'; found prompt"),
        ("nothing", "expected MODULE:FUNCTION or one of regex:PATTERN, exact:COLUMN"),
    ],
)
def test_specs_that_say_nothing(spec, said):
    with pytest.raises(ValueError, match=said):
        rewards.open_source(spec, ["prompt"])


@pytest.fixture
def module(monkeypatch):
    found = ModuleType("my_rewards")
    monkeypatch.setitem(sys.modules, "my_rewards", found)
    return found


def test_functions_get_what_they_name(module):
    module.of_all = lambda prompt, response, row: (prompt, row["ended"], row["n"]) and len(response)
    module.of_row = lambda row: row["n"]
    module.any = lambda **everything: len(everything)
    for name, wanted in (("of_all", 3), ("of_row", 5), ("any", 3)):
        assert value(f"my_rewards:{name}", "abc", n=5) == wanted


MESSAGES = [{"role": "user", "content": "ask"}]


def test_trl_s_signature(module):
    """Prompts and answers are messages where the data's are, and every column of the data is there."""

    def reward(completions, n, **others):
        assert others["prompts"] == [MESSAGES] * 2 and others["other"] == [None, "x"]
        return [len(c[0]["content"]) * k for c, k in zip(completions, n, strict=True)]

    module.reward = reward
    source = rewards.open_source("my_rewards:reward", ["n", "other"])
    found = rewards.score(source, [sample("ab", n=1), sample("abc", n=10, other="x")])
    assert found.tolist() == [2, 30]


@pytest.mark.parametrize("row", [{"prompt": "ask"}, {"question": "ask"}])
def test_trl_s_signature_has_texts_where_the_data_has(module, row):
    """As trl.GRPOTrainer calls it for such data: a length of messages would be 1, whatever they say."""

    def reward(prompts, completions, completion_ids, log_extra=None):
        assert prompts == ["ask"] * 2 and completion_ids == [[4, 5, 2], [6]]
        return [float(len(c)) for c in completions]

    module.reward = reward
    source = rewards.open_source("my_rewards:reward", [*row])
    answers = [sample("four", **row), sample("a", **row)]
    answers = [a._replace(ids=ids) for a, ids in zip(answers, [(4, 5, 2), (6,)], strict=True)]
    assert rewards.score(source, answers).tolist() == [4, 1]
    module.reward = lambda completions: [c[0]["content"] for c in completions]
    messages = rewards.open_source("my_rewards:reward", [*row])
    with pytest.raises(DataError, match="completions are texts where the data's prompts are"):
        rewards.score(messages, answers)


def test_trl_s_own_rewards(module):
    """Unchanged, those of tokens and those of messages."""
    trl = pytest.importorskip("trl.rewards")
    module.soft = trl.get_soft_overlong_punishment(max_completion_len=16, soft_punish_cache=4)
    module.think = trl.think_format_reward
    source = rewards.open_source("my_rewards:soft", [])
    answers = [sample("x")._replace(ids=(5,) * n) for n in (10, 13, 16)]
    assert rewards.score(source, answers).tolist() == [0, -0.25, -1]
    source = rewards.open_source("my_rewards:think", [])
    answers = [sample("<think>\na\n</think>\nb"), sample("b")]
    assert rewards.score(source, answers).tolist() == [1, 0]


@pytest.mark.parametrize("columns", [["prompt"], []])
def test_a_column_that_is_not_there_is_refused_at_once(module, columns):
    module.reward = lambda completions, solution: [1.0]
    with pytest.raises(
        ValueError, match="takes solution, and --eval_data has no such column: give"
    ):
        rewards.open_source("my_rewards:reward", columns, "--eval_data")
    module.reward = lambda completions, solution=None: [1.0] * len(completions)
    source = rewards.open_source("my_rewards:reward", columns)
    assert rewards.score(source, [sample("x")]) == [1]


def test_async_functions_are_waited_for_together(module):
    """As long as one of them takes, not all: judges are asked over a network."""
    open_calls, most = [], []

    async def one(response):
        open_calls.append(response)
        most.append(len(open_calls))
        await asyncio.sleep(0.01)
        open_calls.remove(response)
        return float(len(response))

    async def trls(completions):
        await asyncio.sleep(0.01)
        return [float(len(c[0]["content"])) for c in completions]

    module.one, module.trls = one, trls
    for name in ("one", "trls"):
        source = rewards.open_source(f"my_rewards:{name}", [])
        assert rewards.score(source, [sample("ab"), sample("abc")]).tolist() == [2, 3]
    assert max(most) == 2


def test_a_function_keeps_its_hands_off_what_others_see(module):
    def greedy(completions, prompts, tags):
        for prompt, completion in zip(prompts, completions, strict=True):
            prompt.extend(completion)
        tags[0].append("seen")
        return [0.0] * len(completions)

    module.greedy = greedy
    module.own = lambda row: float(len(row["tags"])) + len(row["tags"].append("x") or "")
    answers = [sample("x", tags=[]), sample("y", tags=[])]
    rewards.score(rewards.open_source("my_rewards:greedy", ["tags"]), answers)
    own = rewards.open_source("my_rewards:own", ["tags"])
    assert rewards.score(own, answers).tolist() == rewards.score(own, answers).tolist() == [0, 0]
    assert all(each.messages == MESSAGES for each in answers)


@pytest.mark.parametrize(
    ("result", "wanted"),
    [
        ([1, True], [1, 1]),
        (np.array([0.5, 2.0]), [0.5, 2]),
        (torch.tensor([0.5, 2.0]), [0.5, 2]),
        ((np.float32(0.5), None), [0.5, np.nan]),
        ([torch.tensor(3), Fraction(1, 2)], [3, 0.5]),
    ],
)
def test_what_is_a_list_of_numbers(module, result, wanted):
    module.reward = lambda completions: result
    source = rewards.open_source("my_rewards:reward", [])
    assert np.array_equal(rewards.score(source, [sample("x")] * 2), wanted, equal_nan=True)


@pytest.mark.parametrize("result", [0.5, "ab", {0: 1, 1: 2}, None, torch.tensor(1.0)], ids=repr)
def test_what_is_none(module, result):
    module.reward = lambda completions: result
    source = rewards.open_source("my_rewards:reward", [])
    with pytest.raises(DataError, match="the reward reward failed on row 7"):
        rewards.score(source, [sample("x")] * 2)


def test_a_callable_that_is_no_plain_function(module):
    class Reward:
        def __call__(self, response, threshold):
            return float(len(response) > threshold)

    module.partial = functools.partial(Reward(), threshold=1)
    assert value("my_rewards:partial", "ab") == 1
    module.instance = Reward()
    with pytest.raises(
        ValueError, match="--reward my_rewards:instance takes threshold: expected any"
    ):
        rewards.open_source("my_rewards:instance", [])
    module.builtin = max
    with pytest.raises(ValueError, match="my_rewards:builtin does not say what it takes: wrap it"):
        rewards.open_source("my_rewards:builtin", [])


@pytest.mark.parametrize(
    ("result", "said"),
    [
        ("1", "gave '1' for row 7, prompt 'ask', answer 'x'"),
        (float("nan"), "gave nan for row 7"),
        (float("inf"), "gave inf"),
        (10**400, "gave 1000"),
        (-1e101, r"gave -1e\+101 for row 7.*no larger than 1e\+100"),
        ([1.0], r"gave \[1.0\]"),
    ],
)
def test_what_is_no_number_ends_the_run(module, result, said):
    module.reward = lambda response: result
    source = rewards.open_source("my_rewards:reward", [])
    with pytest.raises(DataError, match=said):
        rewards.score(source, [sample("x")])


def test_a_wrong_count_and_an_exception(module):
    module.reward = lambda completions: [1.0]
    with pytest.raises(DataError, match="gave 1 for 2 samples"):
        rewards.score(rewards.open_source("my_rewards:reward", []), [sample("x")] * 2)

    def fails(response):
        return 1 / (response != "bad")

    module.reward = fails
    source = rewards.open_source("my_rewards:reward", [])
    with pytest.raises(DataError, match="failed on row 7, prompt 'ask', answer 'bad'") as caught:
        rewards.score(source, [sample("good"), sample("bad")])
    assert "ZeroDivisionError" in str(caught.value) and "in fails" in str(caught.value)
