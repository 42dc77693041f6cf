"""Reward models that others have made: off which token a score is read."""

import json
import logging
from types import SimpleNamespace

import pytest
import tiny
import torch
import transformers

from eval.generations import prompts_of
from train.data import prompts, tokens
from train.data.errors import DataError
from train.methods.policy_setup import Rewards, samples_of
from train.methods.rewards import RewardModel
from train.methods.rollout import Answers
from train.models.generate import Completion


def saved(folder, **overrides):
    tiny.make_score_model("qwen2", **overrides).save_pretrained(folder)
    tiny.save_tokenizer(folder)
    return folder


def test_a_model_that_reads_its_last_token_is_taken_in_silence(tmp_path, caplog):
    """SmolLM's case: the pad is the end token, and the texts end in a newline."""
    with caplog.at_level(logging.WARNING, "zeropref"):
        judge = RewardModel(saved(tmp_path, pad_token_id=2), torch.device("cpu"))
    assert judge.ids([{"role": "user", "content": "a"}], "b", ended=True)[-2] == 2
    assert not caplog.records


def test_a_model_that_reads_another_token_is_named(tmp_path, caplog):
    """Its pad is the newline that the template ends with."""
    newline = tiny.save_tokenizer(tmp_path / "tokenizer")("\n")["input_ids"]
    assert len(newline) == 1
    with caplog.at_level(logging.WARNING, "zeropref"):
        RewardModel(saved(tmp_path / "model", pad_token_id=newline[0]), torch.device("cpu"))
    [warning] = [record.getMessage() for record in caplog.records]
    assert "reads its scores off '<|im_end|>', not off the last token" in warning
    assert f"its pad token, id {newline[0]}, is what the chat template ends with" in warning


def test_two_outputs_and_no_tokenizer(tmp_path):
    lm = tiny.make_score_model("qwen2")
    lm.config.num_labels = 2
    two = transformers.AutoModelForSequenceClassification.from_config(lm.config)
    two.save_pretrained(tmp_path / "two")
    with pytest.raises(ValueError, match="two is no reward model: it has 2 outputs, not 1"):
        RewardModel(tmp_path / "two", torch.device("cpu"))
    lm = tiny.make_score_model("qwen2").save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match="tokenizer"):
        RewardModel(tmp_path / "bare", torch.device("cpu"))


def test_scores_under_bf16_have_the_digits_of_fp32(tmp_path):
    """Else answers of a group would often be worth exactly the same."""
    judge = RewardModel(saved(tmp_path, pad_token_id=2), torch.device("cpu"), torch.bfloat16)
    ask = [{"role": "user", "content": "a question"}]
    scores = judge.score([ask] * 8, [f"answer {n}" for n in range(8)], [True] * 8)
    rounded = torch.tensor(scores).bfloat16().double().numpy()
    assert (scores != rounded).sum() > 4


@pytest.mark.parametrize("pad", [0, None])
def test_texts_scored_together_have_the_scores_of_each_alone(tmp_path, pad):
    """Of several lengths, in any order, finished and cut, over several batches; a class without a
    pad token takes one at a time.
    """
    judge = RewardModel(saved(tmp_path, pad_token_id=pad), torch.device("cpu"))
    judge.own.batch_tokens = 150
    ask = [{"role": "user", "content": "a question"}]
    texts = ["word " * n + "end" for n in (9, 1, 30, 2, 3, 17)]
    ended = [True, False, True, True, False, True]
    found = judge.score([ask] * len(texts), texts, ended)
    exact = judge.model.double()
    for text, finished, score in zip(texts, ended, found, strict=True):
        ids = torch.tensor([judge.ids(ask, text, finished)])
        with torch.no_grad():
            assert score == pytest.approx(float(exact(input_ids=ids).logits[0, 0]), abs=1e-5)
    parts = judge.own.parts([len(judge.ids(ask, *each)) for each in zip(texts, ended, strict=True)])
    assert sorted(i for part in parts for i in part) == list(range(len(texts)))
    assert (max(map(len, parts)) == 1) == (pad is None)


TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
NAMES_TOOLS = tiny.CHATML.replace(
    "{% for m in messages %}",
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}",
)


def test_keys_of_the_row_reach_the_reward_model_s_template(tmp_path):
    """As they do when it is trained: without its tools a call would be judged for nothing."""
    judge = RewardModel(saved(tmp_path, pad_token_id=0), torch.device("cpu"))
    judge.tokenizer.chat_template = NAMES_TOOLS
    ask = [{"role": "user", "content": "2 + 3"}]
    answered = [*ask, {"role": "assistant", "content": "add"}]
    wanted = judge.tokenizer.apply_chat_template(answered, tools=TOOLS, return_dict=False)
    assert judge.ids(ask, "add", True, {"tools": TOOLS}) == wanted
    with_tools, without = judge.score([ask] * 2, ["add"] * 2, [True] * 2, [{"tools": TOOLS}, {}])
    with torch.no_grad():
        exact = float(judge.model.double()(input_ids=torch.tensor([wanted])).logits[0, 0])
    assert with_tools == pytest.approx(exact, abs=1e-5) and abs(with_tools - without) > 1e-3


def test_samples_and_evaluation_s_prompts_have_the_keys_of_their_rows(tmp_path):
    tokenizer = tiny.save_tokenizer(tmp_path)
    tokenizer.chat_template = NAMES_TOOLS
    row = {"prompt": "2 + 3", "chosen": "add", "rejected": "no", "tools": TOOLS}
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row))
    found = prompts.prepare([str(path)], tokenizer, max_length=400)
    answers = Answers((0,), (found.ids(0),), (Completion((5, 2), True),))
    [sample] = samples_of(answers, found, tokenizer, most=8)
    pairs = tokens.prepare([str(path)], tokenizer, max_length=400)
    [asked] = prompts_of([str(path)], pairs)
    assert sample.template_args == asked.template_args == {"tools": TOOLS}
    judge = RewardModel(saved(tmp_path / "judge", pad_token_id=0), torch.device("cpu"))
    judge.tokenizer.chat_template = NAMES_TOOLS
    settings = SimpleNamespace(reward_weights=None, reward_clip=None, missing_end_penalty=0.0)
    _, [score] = Rewards([], judge, settings).score([sample])
    ids = judge.ids(sample.messages, sample.response, True, {"tools": TOOLS})
    assert score == pytest.approx(float(judge.own.alone(torch.tensor(ids))), abs=1e-5)


def test_a_cut_answer_has_nothing_of_what_the_template_puts_behind_one(tmp_path):
    """Nor what stands before the end token: a mark that closes the answer, a space."""
    judge = saved(tmp_path, pad_token_id=0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(judge)
    closes = "m['content'] + (' <|endoftext|>' if m['role'] == 'assistant' else '')"
    tokenizer.chat_template = tiny.CHATML.replace("m['content']", closes)
    tokenizer.save_pretrained(judge)
    judge = RewardModel(judge, torch.device("cpu"))
    ask = [{"role": "user", "content": "a question"}]
    cut, whole = (judge.ids(ask, "Sure.", ended) for ended in (False, True))
    assert tokenizer.decode(whole[len(cut) :]) == " <|endoftext|><|im_end|>\n"
    assert tokenizer.decode(cut).endswith("assistant\nSure.")


CUTS_THOUGHTS = tiny.CHATML.replace("m['content']", "m['content'].split('</think>')[-1]")
REFUSES = tiny.CHATML.replace(
    "{% for m in messages %}",
    "{% for m in messages %}{% if '!' in m['content'] %}{{ raise_exception('no shouting') }}{% endif %}",
)


@pytest.mark.parametrize("text", ["<think>a</think>", "</think>", "a</think></think>"])
def test_an_answer_of_which_the_template_leaves_nothing_is_scored_as_rendered(tmp_path, text):
    """A policy may write anything, and a run must not end for it."""
    judge = RewardModel(saved(tmp_path, pad_token_id=0), torch.device("cpu"))
    judge.tokenizer.chat_template = CUTS_THOUGHTS
    ask = [{"role": "user", "content": "a question"}]
    wanted = judge.tokenizer.apply_chat_template(
        [*ask, {"role": "assistant", "content": text}], return_dict=False
    )
    assert judge.ids(ask, text, True) == wanted
    assert judge.ids(ask, text, False) == wanted[:-2]  # neither end token nor newline


def test_an_answer_that_the_template_refuses_follows_the_prompt_as_it_is(tmp_path, caplog):
    judge = RewardModel(saved(tmp_path, pad_token_id=0), torch.device("cpu"))
    judge.tokenizer.chat_template = REFUSES
    ask = [{"role": "user", "content": "a question"}]
    plain = judge.ids(ask, "Sure.", True)
    with caplog.at_level(logging.WARNING, "zeropref"):
        found = [judge.ids(ask, "Sure!", ended) for ended in (True, True, False)]
    text = judge.tokenizer("Sure!", add_special_tokens=False)["input_ids"]
    header = judge.chat.prompt_ids(ask)
    assert found == [header + text + plain[-2:]] * 2 + [header + text]
    [warning] = [record.getMessage() for record in caplog.records]
    assert "scored as it stands behind its prompt" in warning and "no shouting" in warning
    with pytest.raises(ValueError, match="--reward_model .* a prompt of the data .*no shouting"):
        judge.ids([{"role": "user", "content": "Go!"}], "Sure.", True)


def test_answers_longer_than_the_model_s_positions(tmp_path, caplog):
    """An answer of few tokens to the policy may be of many to another tokenizer: nothing crashes, and
    its beginning is scored, which is said once.
    """
    sizes = dict(n_positions=96, pad_token_id=0)
    tiny.make_score_model("gpt2", **sizes).save_pretrained(tmp_path)
    tiny.save_tokenizer(tmp_path)
    judge = RewardModel(tmp_path, torch.device("cpu"))
    ask = [{"role": "user", "content": "question"}]
    texts = ["word " * n for n in (99, 3, 70)]
    with caplog.at_level(logging.WARNING, "zeropref"):
        found = judge.score([ask] * 3, texts, [True] * 3)
    [warning] = [record.getMessage() for record in caplog.records]
    assert "has 96 positions, and a conversation takes" in warning
    for text, score in zip(texts, found, strict=True):
        ids = torch.tensor([judge.ids(ask, text, True)[:96]])
        with torch.no_grad():
            assert score == pytest.approx(float(judge.model(input_ids=ids).logits[0, 0]), abs=1e-5)


def test_the_same_answer_is_worth_the_same(tmp_path):
    """To the last digit, whatever it is scored together with: a group of equal rewards has advantages of
    0, and one of almost equal ones has those of any other.
    """
    judge = RewardModel(saved(tmp_path, pad_token_id=0), torch.device("cpu"))
    judge.own.batch_tokens = 100
    ask = [{"role": "user", "content": "a question"}]
    texts = [f"{'word ' * n}end" for n in range(12)]
    texts = [*texts, *["the very same"] * 7, *texts[:5], "the very same"]
    found = judge.score([ask] * len(texts), texts, [True] * len(texts))
    assert len(set(found[12:19])) == 1 and found[-1] == found[12]
    assert found[19:24].tolist() == found[:5].tolist() and len(set(found)) == 13


@pytest.mark.parametrize("text", ["", " \n", "word"])
def test_a_cut_answer_has_no_end(tmp_path, text):
    """Nor one that says nothing: an end that the policy did not write would be paid for."""
    judge = RewardModel(saved(tmp_path, pad_token_id=0), torch.device("cpu"))
    ask = [{"role": "user", "content": "question"}]
    cut, finished = (judge.ids(ask, text, ended) for ended in (False, True))
    assert judge.ending[0] == 2 and finished == [*cut, *judge.ending]


def test_a_score_that_is_no_number(tmp_path, caplog):
    """It does not mean that the reward does not apply; nor that another token was read."""
    lm = tiny.make_score_model("qwen2", pad_token_id=0)
    torch.nn.init.constant_(lm.score.weight, float("nan"))
    lm.save_pretrained(tmp_path)
    tiny.save_tokenizer(tmp_path)
    with caplog.at_level(logging.WARNING, "zeropref"):
        judge = RewardModel(tmp_path, torch.device("cpu"))
    assert not caplog.records
    ask = [{"role": "user", "content": "question"}]
    with pytest.raises(DataError, match="gives nan for the answer 'b' to 'question': try --prec"):
        judge.score([ask], ["b"], [True])


def test_an_answer_with_a_token_that_the_model_lacks(tmp_path):
    """Its tokenizer is of another model; the class would index beyond its embedding."""
    judge = RewardModel(saved(tmp_path, vocab_size=1000), torch.device("cpu"))
    ask = [{"role": "user", "content": "question"}]
    text = judge.tokenizer.decode([1010])
    assert max(judge.ids(ask, text, True)) == 1010
    with pytest.raises(DataError, match="makes token 1,010, and the model has 1,000"):
        judge.score([ask], [text], [True])
