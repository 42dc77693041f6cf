"""Packed, prompt-sharing log-probabilities against the plain way: each response alone, all logits,
fp64.
"""

import pytest
import tiny
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode
from wide import Wide

from train.data.packing import Group, pack
from train.models import attention
from train.models.backbone import Backbone, no_dropout, refuse_unsupported
from train.models.flops import Counter
from train.models.pretrained import load_causal_lm


def groups(seed=0):
    """k of 1, 2 and 5; one-token responses; a long multi-turn prompt; a one-token prompt; plain
    text.
    """
    random = torch.Generator().manual_seed(seed)
    ids = lambda n: tuple(torch.randint(3, 1000, (n,), generator=random).tolist())
    sizes = [(7, 5, 9), (60, 1, 3), (3, 12), (0, 9), (1, 1), (11, 4, 1, 30, 2, 8), (16, 2, 1)]
    return [Group(ids(p), tuple(ids(n) for n in r), row=i) for i, (p, *r) in enumerate(sizes)]


def alone(lm, row):
    """The oracle: one unpadded sequence a response through the model as transformers has it, all
    logits.
    """
    out = []
    for ids, first in row.sequences():
        logps = torch.log_softmax(
            lm(input_ids=ids[None], use_cache=False).logits[0], dim=-1
        )  # (P+R, V)
        out.append(logps[first - 1 : -1].gather(1, ids[first:, None]).squeeze(1))
    return torch.cat(out)


def value_and_gradients(lm, logps):
    """Log-probs, and the gradient of their randomly weighted sum for every parameter."""
    weights = torch.randn(
        logps.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    ).to(logps.dtype)
    lm.zero_grad()
    (logps * weights).sum().backward()
    return logps.detach(), {name: p.grad.clone() for name, p in lm.named_parameters()}


def packed_and_alone(family, dtype, row, **options):
    oracle = tiny.make_model(family, dtype=torch.float64)
    backbone = Backbone(tiny.make_model(family, dtype=dtype), **options)
    with Wide():
        expected = value_and_gradients(oracle, alone(oracle, row))
        ours = None if dtype == torch.float32 else value_and_gradients(backbone.lm, backbone(row))
    return ours or value_and_gradients(backbone.lm, backbone(row)), expected


def relative(found, expected):
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_packed_equals_one_by_one_in_fp64(family):
    (logps, gradients), (expected, expected_gradients) = packed_and_alone(
        family, torch.float64, pack(groups())
    )
    assert (logps - expected).abs().max() < 1e-9
    for name, gradient in gradients.items():
        assert relative(gradient, expected_gradients[name]) < 1e-9, name


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_packed_equals_one_by_one_in_fp32(family):
    (logps, gradients), (expected, expected_gradients) = packed_and_alone(
        family, torch.float32, pack(groups())
    )
    assert ((logps.double() - expected).abs() / expected.abs()).max() < 1e-5
    assert max(relative(gradients[name], expected_gradients[name]) for name in gradients) < 1e-5


def test_small_logits_budget_changes_nothing():
    # 3 tokens of logits a chunk: most chunks are computed twice
    row = pack(groups())
    (logps, gradients), (expected, expected_gradients) = packed_and_alone(
        "llama", torch.float64, row, logits_bytes=3 * 1024 * 8
    )
    assert (logps - expected).abs().max() < 1e-9
    assert max(relative(gradients[name], expected_gradients[name]) for name in gradients) < 1e-9


def test_padded_layout_equals_one_by_one():
    (logps, gradients), (expected, expected_gradients) = packed_and_alone(
        "llama", torch.float64, pack(groups()), layout="padded"
    )
    assert (logps - expected).abs().max() < 1e-9
    assert max(relative(gradients[name], expected_gradients[name]) for name in gradients) < 1e-9


def test_checkpointed_activations_change_nothing():
    row = pack(groups())
    lm = tiny.make_model("llama", dtype=torch.float64)
    expected = value_and_gradients(lm, Backbone(lm)(row))
    backbone = Backbone(lm)
    backbone.checkpoint_activations()
    found = value_and_gradients(lm, backbone(row))
    assert torch.equal(found[0], expected[0])
    assert all(
        torch.allclose(found[1][name], expected[1][name], rtol=1e-12, atol=0)
        for name in expected[1]
    )


def test_responses_do_not_see_each_other():
    random = groups()[5]
    changed = random._replace(responses=(random.responses[0], (5,), *random.responses[2:]))
    backbone = Backbone(tiny.make_model("llama", dtype=torch.float64))
    first, second = backbone(pack([random])), backbone(pack([changed]))
    same = torch.ones(first.shape, dtype=torch.bool)
    same[len(random.responses[0])] = False  # the changed response has one token
    assert torch.equal(first[same], second[same]) and first[~same] != second[~same]


def test_empty_row_has_zero_gradients():
    backbone = Backbone(tiny.make_model("llama"))
    logps, gradients = value_and_gradients(backbone.lm, backbone(pack([])))
    assert logps.shape == (0,)
    assert len(gradients) == len(list(backbone.lm.parameters())) and all(
        not g.any() for g in gradients.values()
    )


def test_tied_head_gets_both_gradients():
    lm = tiny.make_model("llama", dtype=torch.float64)
    embedding = lm.get_input_embeddings().weight
    assert lm.get_output_embeddings().weight is embedding
    target, unseen = (
        900,
        901,
    )  # neither id stands in the prompt: what reaches their rows comes through the head
    _, gradients = value_and_gradients(lm, Backbone(lm)(pack([Group((5, 6), ((target,),))])))
    gradient = gradients["model.embed_tokens.weight"]
    assert gradient[target].any() and gradient[unseen].any()
    untied = tiny.make_model("llama", dtype=torch.float64, tie_word_embeddings=False)
    untied.load_state_dict(
        {**lm.state_dict(), "lm_head.weight": lm.state_dict()["model.embed_tokens.weight"]}
    )
    _, parts = value_and_gradients(untied, Backbone(untied)(pack([Group((5, 6), ((target,),))])))
    assert parts["model.embed_tokens.weight"].any()
    assert torch.allclose(
        gradient, parts["model.embed_tokens.weight"] + parts["lm_head.weight"], rtol=1e-12
    )


def test_gathered_keys_have_the_gradient_of_indexing():
    row = pack(groups())
    x = torch.randn(len(row.input_ids), 2, 3, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(len(row.kv_index), 2, 3, dtype=torch.float64)
    (expected,) = torch.autograd.grad((x[row.kv_index] * weights).sum(), x)
    found = attention.GatherKeys.apply(x, row.kv_index, row.kv_users)
    assert torch.equal(found, x[row.kv_index])
    (gradient,) = torch.autograd.grad((found * weights).sum(), x)
    assert torch.allclose(gradient, expected, rtol=1e-14)


def test_bf16_autocast_stays_near_fp32():
    row = pack(groups())
    exact = Backbone(tiny.make_model("llama", initializer_range=0.02))(row)
    half = Backbone(tiny.make_model("llama", initializer_range=0.02), autocast=torch.bfloat16)(row)
    assert half.dtype == torch.float32
    assert 0 < (half - exact).abs().mean() < 0.05


@pytest.mark.parametrize(
    "config, reason",
    [
        (
            transformers.Gemma2Config(
                vocab_size=64,
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                head_dim=16,
                intermediate_size=32,
            ),
            "soft-capped attention",
        ),
        (
            transformers.CohereConfig(
                vocab_size=64,
                hidden_size=32,
                num_hidden_layers=1,
                num_attention_heads=2,
                intermediate_size=32,
            ),
            "scaled logits",
        ),
        (
            transformers.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1),
            "linear_attention layers",
        ),
        (
            transformers.BloomConfig(vocab_size=64, hidden_size=32, n_layer=1, n_head=2),
            "an attention of its own",
        ),
        (
            transformers.GptOssConfig(
                vocab_size=64,
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                head_dim=16,
                intermediate_size=32,
                num_local_experts=2,
                num_experts_per_tok=1,
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
        vocab_size=1024,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        intermediate_size=32,
    )
    lm = transformers.AutoModelForCausalLM.from_config(
        config, dtype=torch.float64, attn_implementation="eager"
    ).eval()
    row = pack(groups())
    with Wide():
        assert (Backbone(lm, layout="padded")(row) - alone(lm, row)).abs().max() < 1e-9


def test_dropout_is_off_in_training_mode():
    lm = tiny.make_model("gpt2", attn_pdrop=0.5, resid_pdrop=0.5, embd_pdrop=0.5)
    no_dropout(lm)
    lm.train()
    row = pack(groups())
    backbone = Backbone(lm)
    assert torch.equal(backbone(row), backbone(row))


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_flops_equal_a_profiler_s_count(family):
    row = pack([Group((5,), ((9,),)), Group((), ((3,),)), Group((), ((4,),))])
    backbone = Backbone(tiny.make_model(family))
    with FlopCounterMode(display=False) as profiler:
        backbone(row)
    # The profiler does not see inside the CPU's attention kernel: layers x 4 x width for each of
    # the 3 + 1 + 1 pairs.
    attention_flops = {"llama": 2, "gemma3": 3, "gpt2": 2}[family] * 4 * 64 * 5
    assert Counter(backbone).forward(row) == profiler.get_total_flops() + attention_flops


def test_flops_of_attention_by_hand():
    backbone = Backbone(tiny.make_model("llama"))
    row = pack([Group((1, 2), ((3, 4), (5,)))])
    # [P A]: 1 + 2 + 3 + 4 pairs; [B] sees P and itself: 3
    body = sum(
        m.weight.numel()
        for n, m in backbone.lm.model.named_modules()
        if isinstance(m, torch.nn.Linear)
    )
    expected = 2 * body * 5 + 2 * 1024 * 64 * 3 + 2 * (2 * 2 * 64 * 13)
    assert Counter(backbone).forward(row) == expected


def test_a_directory_without_a_model_is_named(tmp_path):
    with pytest.raises(ValueError, match=f"cannot load a causal language model from {tmp_path}"):
        load_causal_lm(tmp_path)


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
        refuse_unsupported(lm)
