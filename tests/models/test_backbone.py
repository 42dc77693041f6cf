"""Packed, prompt-sharing log-probabilities against the plain way: each response alone, all logits,
fp64.
"""

import contextlib

import pytest
import tiny
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode
from wide import Wide

from train.data.packing import Group, pack
from train.models import attention, flops
from train.models.backbone import Backbone, disable_dropout
from train.models.flops import FlopCounter
from train.models.pretrained import load_causal_lm, load_tokenizer


def groups(seed=0):
    """k of 1, 2 and 5; one-token responses; a long multi-turn prompt; a one-token prompt; plain
    text.
    """
    random = torch.Generator().manual_seed(seed)

    def ids(n):
        return tuple(torch.randint(3, 1000, (n,), generator=random).tolist())

    sizes = [(7, 5, 9), (60, 1, 3), (3, 12), (0, 9), (1, 1), (11, 4, 1, 30, 2, 8), (16, 2, 1)]
    return [Group(ids(p), tuple(ids(n) for n in r), row=i) for i, (p, *r) in enumerate(sizes)]


def one_by_one(lm, batch):
    """The oracle: one unpadded sequence a response through the model as transformers has it, all
    logits. (T,) nats.
    """
    out = []
    for ids, first in batch.sequences():
        logits = lm(input_ids=ids[None], use_cache=False).logits[0]  # (P+R, V)
        logps = torch.log_softmax(logits, dim=-1)
        out.append(logps[first - 1 : -1].gather(1, ids[first:, None]).squeeze(1))
    return torch.cat(out)


def value_and_gradients(lm, logps):
    """Log-probs, and the gradient of their randomly weighted sum for every parameter."""
    random = torch.Generator().manual_seed(1)
    weights = torch.randn(logps.shape, dtype=torch.float64, generator=random)
    lm.zero_grad()
    (logps * weights.to(logps.dtype)).sum().backward()
    return logps.detach(), {name: p.grad.clone() for name, p in lm.named_parameters()}


def ours_and_one_by_one(family, dtype, batch, **options):
    """Log-probs and gradients of a Backbone in `dtype`, and of the oracle in fp64."""
    oracle = tiny.make_model(family, dtype=torch.float64)
    backbone = Backbone(tiny.make_model(family, dtype=dtype), **options)
    with Wide():
        expected = value_and_gradients(oracle, one_by_one(oracle, batch))
    with Wide() if dtype == torch.float64 else contextlib.nullcontext():
        ours = value_and_gradients(backbone.lm, backbone(batch))
    return ours, expected


def relative(gradient, expected):
    return float((gradient.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_packed_equals_one_by_one_in_fp64(family):
    (logps, gradients), (expected, expected_gradients) = ours_and_one_by_one(
        family, torch.float64, pack(groups())
    )
    assert (logps - expected).abs().max() < 1e-9
    for name, gradient in gradients.items():
        assert relative(gradient, expected_gradients[name]) < 1e-9, name


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_layers_with_windows_of_their_own(family):
    windows = dict(
        use_sliding_window=True,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
    )
    oracle = tiny.make_model(family, torch.float64, **windows)
    backbone = Backbone(tiny.make_model(family, torch.float64, **windows))
    batch = pack(groups())
    with Wide():
        expected = one_by_one(oracle, batch)
        assert (backbone(batch) - expected).abs().max() < 1e-9
    without = Backbone(tiny.make_model(family, torch.float64))
    assert (without(batch) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_packed_equals_one_by_one_in_fp32(family):
    (logps, gradients), (expected, expected_gradients) = ours_and_one_by_one(
        family, torch.float32, pack(groups())
    )
    assert ((logps.double() - expected).abs() / expected.abs()).max() < 1e-5
    assert max(relative(gradients[name], expected_gradients[name]) for name in gradients) < 1e-5


def test_small_logits_budget_changes_nothing():
    # 3 tokens of logits a chunk: most chunks are computed twice
    batch = pack(groups())
    (logps, gradients), (expected, expected_gradients) = ours_and_one_by_one(
        "llama", torch.float64, batch, logits_bytes=3 * 1024 * 8
    )
    assert (logps - expected).abs().max() < 1e-9
    assert max(relative(gradients[name], expected_gradients[name]) for name in gradients) < 1e-9


def test_padded_layout_equals_one_by_one():
    (logps, gradients), (expected, expected_gradients) = ours_and_one_by_one(
        "llama", torch.float64, pack(groups()), layout="padded"
    )
    assert (logps - expected).abs().max() < 1e-9
    assert max(relative(gradients[name], expected_gradients[name]) for name in gradients) < 1e-9


def test_checkpointed_activations_change_nothing():
    batch = pack(groups())
    lm = tiny.make_model("llama", dtype=torch.float64)
    expected, expected_gradients = value_and_gradients(lm, Backbone(lm)(batch))
    backbone = Backbone(lm)
    backbone.checkpoint_activations()
    logps, gradients = value_and_gradients(lm, backbone(batch))
    assert torch.equal(logps, expected)
    for name, gradient in expected_gradients.items():
        assert torch.allclose(gradients[name], gradient, rtol=1e-12, atol=0), name


def test_responses_do_not_see_each_other():
    group = groups()[5]
    changed = group._replace(responses=(group.responses[0], (5,), *group.responses[2:]))
    backbone = Backbone(tiny.make_model("llama", dtype=torch.float64))
    before = backbone(pack([group]))
    after = backbone(pack([changed]))
    same = torch.ones(before.shape, dtype=torch.bool)
    same[len(group.responses[0])] = False  # the changed response has one token
    assert torch.equal(before[same], after[same]) and before[~same] != after[~same]


def test_empty_batch_has_zero_gradients():
    backbone = Backbone(tiny.make_model("llama"))
    logps, gradients = value_and_gradients(backbone.lm, backbone(pack([])))
    assert logps.shape == (0,)
    assert len(gradients) == len(list(backbone.lm.parameters()))
    assert not any(g.any() for g in gradients.values())


def test_tied_head_gets_both_gradients():
    lm = tiny.make_model("llama", dtype=torch.float64)
    embedding = lm.get_input_embeddings().weight
    assert lm.get_output_embeddings().weight is embedding
    # neither id stands in the prompt: what reaches their rows comes through the head
    target = 900
    unseen = 901
    _, gradients = value_and_gradients(lm, Backbone(lm)(pack([Group((5, 6), ((target,),))])))
    gradient = gradients["model.embed_tokens.weight"]
    assert gradient[target].any() and gradient[unseen].any()
    untied = tiny.make_model("llama", dtype=torch.float64, tie_word_embeddings=False)
    state = lm.state_dict()
    untied.load_state_dict({**state, "lm_head.weight": state["model.embed_tokens.weight"]})
    _, parts = value_and_gradients(untied, Backbone(untied)(pack([Group((5, 6), ((target,),))])))
    assert parts["model.embed_tokens.weight"].any()
    both = parts["model.embed_tokens.weight"] + parts["lm_head.weight"]
    assert torch.allclose(gradient, both, rtol=1e-12)


def test_gathered_keys_have_the_gradient_of_indexing():
    batch = pack(groups())
    x = torch.randn(len(batch.input_ids), 2, 3, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(len(batch.kv_index), 2, 3, dtype=torch.float64)
    (expected,) = torch.autograd.grad((x[batch.kv_index] * weights).sum(), x)
    keys = attention.GatherKeys.apply(x, batch.kv_index, batch.kv_users)
    assert torch.equal(keys, x[batch.kv_index])
    (gradient,) = torch.autograd.grad((keys * weights).sum(), x)
    assert torch.allclose(gradient, expected, rtol=1e-14)


def test_bf16_autocast_stays_near_fp32():
    batch = pack(groups())
    lm = tiny.make_model("llama", initializer_range=0.02)
    exact = Backbone(lm)(batch)
    half = Backbone(lm, autocast=torch.bfloat16)(batch)
    assert half.dtype == torch.float32
    assert 0 < (half - exact).abs().mean() < 0.05


SMALL = dict(vocab_size=64, hidden_size=32)
GROUPED = dict(num_attention_heads=2, num_key_value_heads=1, head_dim=16, intermediate_size=32)


@pytest.mark.parametrize(
    "config, reason",
    [
        (
            transformers.Gemma2Config(**SMALL, **GROUPED, num_hidden_layers=2),
            "soft-capped attention",
        ),
        (
            transformers.CohereConfig(
                **SMALL, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
            ),
            "scaled logits",
        ),
        (transformers.MambaConfig(**SMALL, num_hidden_layers=1), "linear_attention layers"),
        (transformers.BloomConfig(**SMALL, n_layer=1, n_head=2), "an attention of its own"),
        (
            transformers.GptOssConfig(
                **SMALL, **GROUPED, num_hidden_layers=2, num_local_experts=2, num_experts_per_tok=1
            ),
            "attention sinks",
        ),
    ],
    ids=["gemma2", "cohere", "mamba", "bloom", "gpt-oss"],
)
def test_what_cannot_be_packed_is_refused(config, reason):
    lm = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match=f"has {reason}.*--layout padded"):
        Backbone(lm)


def test_refused_models_train_padded():
    config = transformers.Gemma2Config(
        vocab_size=1024, hidden_size=32, num_hidden_layers=2, **GROUPED
    )
    lm = transformers.AutoModelForCausalLM.from_config(
        config, dtype=torch.float64, attn_implementation="eager"
    ).eval()
    batch = pack(groups())
    with Wide():
        assert (Backbone(lm, layout="padded")(batch) - one_by_one(lm, batch)).abs().max() < 1e-9


def test_dropout_is_off_in_training_mode():
    lm = tiny.make_model("gpt2", attn_pdrop=0.5, resid_pdrop=0.5, embd_pdrop=0.5)
    disable_dropout(lm)
    lm.train()
    batch = pack(groups())
    backbone = Backbone(lm)
    assert torch.equal(backbone(batch), backbone(batch))


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_flops_equal_a_profiler_s_count(family):
    batch = pack([Group((5,), ((9,),)), Group((), ((3,),)), Group((), ((4,),))])
    backbone = Backbone(tiny.make_model(family))
    with FlopCounterMode(display=False) as profiler:
        backbone(batch)
    # The profiler does not see inside the CPU's attention kernel: layers x 4 x width for each of
    # the 3 + 1 + 1 pairs.
    attention_flops = {"llama": 2, "gemma3": 3, "gpt2": 2}[family] * 4 * 64 * 5
    assert FlopCounter(backbone).forward(batch) == profiler.get_total_flops() + attention_flops


def test_flops_of_attention_by_hand():
    backbone = Backbone(tiny.make_model("llama"))
    batch = pack([Group((1, 2), ((3, 4), (5,)))])
    # [P A]: 1 + 2 + 3 + 4 pairs; [B] sees P and itself: 3
    linear = [m for m in backbone.lm.model.modules() if isinstance(m, torch.nn.Linear)]
    body = sum(m.weight.numel() for m in linear)
    expected = 2 * body * 5 + 2 * 1024 * 64 * 3 + 2 * (2 * 2 * 64 * 13)
    assert FlopCounter(backbone).forward(batch) == expected


@pytest.mark.parametrize("window", [0, 1, 3, 5, 99])
def test_visible_pairs_are_counted_one_by_one(window):
    shape = ((2, 3, 1), (0, 4), (7, 1, 9, 2), (5, 1))
    expected = 0
    for prompt, *responses in shape:
        for j, size in enumerate(responses):
            for query in range(0 if j == 0 else prompt, prompt + size):
                first = max(0, query + 1 - window) if window else 0
                expected += query + 1 - first
    assert flops._visible_pairs(shape, window) == expected


def test_a_directory_without_a_model_is_named(tmp_path):
    with pytest.raises(
        ValueError, match=f"there is no model in {tmp_path}, which has no config.json"
    ):
        load_causal_lm(tmp_path)
    (tmp_path / "manifest.json").touch()  # a checkpoint of a run
    with pytest.raises(ValueError, match=f"python launch/export.py {tmp_path} DIR makes a model"):
        load_causal_lm(tmp_path)


def test_a_tokenizer_that_an_adapter_lacks(tmp_path):
    """The tokenizer is read first, and says the same as the model would."""
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=f"tokenizer from {tmp_path}: it holds an adapter: merge"):
        load_tokenizer(tmp_path)


def test_pickled_weights_are_refused(tmp_path):
    lm = tiny.make_model()
    lm.config.save_pretrained(tmp_path)
    torch.save(lm.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="cannot load a causal language model"):
        load_causal_lm(tmp_path)


def test_head_is_needed():
    lm = tiny.make_model()
    lm.get_output_embeddings = lambda: None
    with pytest.raises(ValueError, match="no output head"):
        Backbone(lm)
