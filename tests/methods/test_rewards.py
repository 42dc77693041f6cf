"""Reward models that others have made: off which token a score is read."""

import logging

import pytest
import tiny
import torch

from train.methods.rewards import RewardModel


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
    import transformers

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


def test_an_answer_with_a_token_that_the_model_lacks(tmp_path):
    """Its tokenizer is of another model; the class would index beyond its embedding."""
    judge = RewardModel(saved(tmp_path, vocab_size=1000), torch.device("cpu"))
    ask = [{"role": "user", "content": "question"}]
    text = judge.tokenizer.decode([1010])
    assert max(judge.ids(ask, text, True)) == 1010
    with pytest.raises(ValueError, match="makes token 1,010, and the model has 1,000"):
        judge.score([ask], [text], [True])
