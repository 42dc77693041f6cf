"""Scores and values of packed batches against transformers' own class, one sequence at a time, fp64."""

import contextlib
import math

import pytest
import tiny
import torch
import transformers
from wide import Wide

from tests.models.test_backbone import groups, relative, value_and_gradients
from train.data.packing import pack
from train.engine import loading
from train.models.backbone import plain_forward
from train.models.flops import FlopCounter
from train.models.heads import Score, ScoreModel, draw_head
from train.models.lora import ADAPTER_NAME, add
from train.models.pretrained import load_causal_lm, load_score_model

FAMILIES = ("llama", "qwen3", "gemma3", "gpt2")


def one_by_one(lm, batch, at):
    """The oracle: one unpadded sequence a response through transformers' class, which reads its
    logit off the last token; or its head on every hidden state before a scored token.
    """
    out = []
    for ids, first in batch.sequences():
        if at == "last":
            out.append(lm(input_ids=ids[None], use_cache=False).logits[0])  # (1,)
        else:
            hidden = lm.base_model(input_ids=ids[None], use_cache=False).last_hidden_state[0]
            out.append(lm.score(hidden)[first - 1 : -1, 0])
    return torch.cat(out)


def ours_and_one_by_one(family, dtype, batch, at, **options):
    """Scores and gradients of a ScoreModel in `dtype`, and of the oracle in fp64."""
    # without a pad id the class takes the last token, whatever it is
    oracle = tiny.make_score_model(family, torch.float64, pad_token_id=None)
    model = ScoreModel(tiny.make_score_model(family, dtype), **options)
    with Wide():
        expected = value_and_gradients(oracle, one_by_one(oracle, batch, at))
    with Wide() if dtype == torch.float64 else contextlib.nullcontext():
        ours = value_and_gradients(model.lm, model(batch, at=at))
    return ours, expected


@pytest.mark.parametrize("at", ["last", "before"])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_equals_one_by_one_in_fp64(family, at):
    (scores, gradients), (expected, expected_gradients) = ours_and_one_by_one(
        family, torch.float64, pack(groups()), at
    )
    assert scores.shape == expected.shape
    assert (scores - expected).abs().max() < 1e-9
    for name, gradient in gradients.items():
        assert relative(gradient, expected_gradients[name]) < 1e-9, name


@pytest.mark.parametrize("at", ["last", "before"])
def test_padded_layout_equals_one_by_one(at):
    (scores, gradients), (expected, expected_gradients) = ours_and_one_by_one(
        "llama", torch.float64, pack(groups()), at, layout="padded"
    )
    assert (scores - expected).abs().max() < 1e-9
    assert max(relative(gradients[name], expected_gradients[name]) for name in gradients) < 1e-9


def test_plain_forward_and_back():
    """The check at a run's start: transformers' own layers and attention, then ours again."""
    model, batch = ScoreModel(tiny.make_score_model()), pack(groups())
    with torch.no_grad():
        packed = model(batch)
        with plain_forward(model):
            assert type(model.lm.model.layers[0].mlp.up_proj) is torch.nn.Linear
            plain = model(batch)
        assert type(model.head) is Score
        assert torch.equal(model(batch), packed)
    assert (packed - plain).abs().max() < 1e-4


def test_checkpointed_activations_change_nothing():
    lm, batch = tiny.make_score_model(dtype=torch.float64), pack(groups())
    expected, expected_gradients = value_and_gradients(lm, ScoreModel(lm)(batch))
    model = ScoreModel(lm)
    model.checkpoint_activations()
    scores, gradients = value_and_gradients(lm, model(batch))
    assert torch.equal(scores, expected)
    for name, gradient in expected_gradients.items():
        assert torch.allclose(gradients[name], gradient, rtol=1e-12, atol=0), name


def test_the_empty_batch_is_part_of_the_graph():
    model = ScoreModel(tiny.make_score_model())
    for at in ("last", "before"):
        scores = model(pack([]), at=at)
        assert scores.shape == (0,)
        scores.sum().backward()
        assert all(not p.grad.any() for p in model.parameters())
        with plain_forward(model):
            assert model(pack([]), at=at).shape == (0,)


@pytest.mark.parametrize("autocast", [False, True])
def test_the_head_computes_in_fp32(autocast):
    """Over bf16 weights, and under autocast: the score is the fp32 product of the hidden state and
    the weight, each as it is.
    """
    lm = tiny.make_score_model(dtype=torch.float32 if autocast else torch.bfloat16)
    model, batch = ScoreModel(lm, autocast=torch.bfloat16 if autocast else None), pack(groups())
    seen = []
    model.head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    scores = model(batch)
    assert scores.dtype == torch.float32
    expected = (seen[0].double() @ lm.score.weight.double().T).squeeze(1)
    assert (scores - expected).abs().max() < 1e-6 * expected.abs().max()
    rounded = seen[0].bfloat16() @ lm.score.weight.bfloat16().T
    assert (rounded.squeeze(1).double() - expected).abs().max() > 1e-4 * expected.abs().max()
    scores.sum().backward()
    assert lm.score.weight.grad.dtype == lm.score.weight.dtype


def test_a_head_of_another_s_class_keeps_its_bias():
    torch.manual_seed(0)
    head = torch.nn.Linear(8, 1)
    torch.nn.init.ones_(head.bias)
    hidden = torch.randn(5, 8)
    expected = head(hidden)
    Score.take(head)
    assert torch.equal(head(hidden), expected)


def test_another_place_is_refused():
    with pytest.raises(ValueError, match="at 'end' is none of last, before"):
        ScoreModel(tiny.make_score_model())(pack(groups()), at="end")


def test_a_head_is_drawn_where_there_is_none(tmp_path):
    """From a causal language model's directory: the same body; the head's standard deviation is 1 /
    sqrt(H + 1), the same for the same seed, and torch's own generator does not move.
    """
    causal = tiny.make_model("qwen2")
    causal.save_pretrained(tmp_path)
    lm, has_head = load_score_model(tmp_path, needs_head=False)
    assert not has_head and lm.config.num_labels == 1
    assert torch.equal(lm.model.embed_tokens.weight, causal.model.embed_tokens.weight)
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    wide, again, other = (torch.empty(1, 100_000) for _ in range(3))
    half = torch.empty(1, 100_000, dtype=torch.bfloat16)
    draw_head(wide, seed=1)
    draw_head(again, seed=1)
    draw_head(other, seed=2)
    draw_head(half, seed=1)
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(wide, again) and not torch.equal(wide, other)
    assert torch.equal(wide.bfloat16(), half)
    # the standard error of a standard deviation is its 1 / sqrt(2 n): 0.0022 of it
    assert wide.std().item() == pytest.approx(1 / math.sqrt(100_001), rel=0.01)
    assert abs(wide.mean().item()) < 4 / 100_000


def test_a_score_model_s_head_is_kept(tmp_path):
    lm = tiny.make_score_model("qwen2")
    lm.save_pretrained(tmp_path)
    loaded, has_head = load_score_model(tmp_path)
    assert has_head and torch.equal(loaded.score.weight, lm.score.weight)


def test_models_that_are_no_reward_models(tmp_path):
    """A causal model where a head is needed, two labels, no model, a score model as a causal one."""
    tiny.make_model("qwen2").save_pretrained(tmp_path / "causal")
    with pytest.raises(ValueError, match="causal is no reward model: it has no score.weight"):
        load_score_model(tmp_path / "causal")
    two = tiny.make_model("qwen2").config
    two.num_labels = 2
    transformers.AutoModelForSequenceClassification.from_config(two).save_pretrained(
        tmp_path / "two"
    )
    with pytest.raises(ValueError, match="two is no reward model: it has 2 outputs, not 1"):
        load_score_model(tmp_path / "two", needs_head=False)
    with pytest.raises(ValueError, match=f"there is no folder {tmp_path}/none"):
        load_score_model(tmp_path / "none")
    tiny.make_score_model("qwen2").save_pretrained(tmp_path / "score")
    with pytest.raises(ValueError, match="score has no weights for lm_head.weight"):
        load_causal_lm(tmp_path / "score")
    with pytest.raises(ValueError, match="Qwen2ForCausalLM has no head score of one output"):
        ScoreModel(tiny.make_model("qwen2"))


def test_flops_of_the_head():
    """A product with H weights for each response, nothing for the other tokens."""
    model, batch = ScoreModel(tiny.make_score_model()), pack(groups())
    counter = FlopCounter(model)
    assert counter.head_weights == 64
    linear = [m for m in model.lm.model.modules() if isinstance(m, torch.nn.Linear)]
    assert counter.body_weights == sum(m.weight.numel() for m in linear)
    alone = counter.forward(batch._replace(lengths=batch.lengths[:0]))
    assert counter.forward(batch) - alone == 2 * 64 * batch.num_responses


def test_adapters_leave_the_head_to_be_trained_whole():
    pytest.importorskip("peft")
    lm = tiny.make_score_model()
    add(lm, rank=2, alpha=4.0, targets=None)
    trained = {name for name, p in lm.named_parameters() if p.requires_grad}
    assert "score.weight" in trained and trained - {"score.weight"}
    assert all(f".{ADAPTER_NAME}." in name for name in trained - {"score.weight"})
    assert lm.lora_config.task_type == "SEQ_CLS" and lm.lora_config.modules_to_save == ["score"]


def test_a_value_model_in_deviations_of_a_reward_model(tmp_path):
    """What it gives is (score - mean) / deviation; its export says so for the next one to read it."""
    lm = tiny.make_score_model("llama")
    lm.config.score_mean, lm.config.score_std = 3.0, 2.0
    lm.save_pretrained(tmp_path / "reward")
    batch = pack(groups())

    def values(path, **options):
        model = loading.load_score_model(path, {}, "fp32", 0, torch.device("cpu"), **options)
        return model, model(batch, at="before").detach()

    _, raw = values(tmp_path / "reward")
    model, found = values(tmp_path / "reward", in_deviations=True)
    assert torch.allclose(found, (raw - 3) / 2, atol=1e-6, rtol=0) and raw.std() > 0.01
    model.lm.save_pretrained(tmp_path / "value")
    again, repeated = values(tmp_path / "value", in_deviations=True)
    assert torch.equal(repeated, found) and again.shift == 1.5
    assert (again.lm.config.score_mean, again.lm.config.score_std) == (1.5, 1.0)
