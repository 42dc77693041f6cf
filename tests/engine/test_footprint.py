"""What training takes of memory, against what autograd keeps of real tensors, and by hand."""

import pytest
import tiny
import torch
import transformers

from train.data.packing import Group, pack
from train.engine import footprint
from train.models.backbone import Backbone

# The families whose layers keep different things. Wide enough that what has one value a token or a
# head is little, as it is in real models.
WIDTHS = {
    "llama": dict(hidden_size=192, num_attention_heads=3, num_key_value_heads=1),
    "qwen3": dict(hidden_size=128, num_attention_heads=4, num_key_value_heads=2, head_dim=64),
    "gemma": dict(hidden_size=128, num_attention_heads=2, num_key_value_heads=1, head_dim=64),
    "mistral": dict(hidden_size=128, num_attention_heads=4, num_key_value_heads=1),
    "gpt2": dict(n_embd=128),
    "gemma3": dict(hidden_size=128, num_attention_heads=2, num_key_value_heads=1, head_dim=64),
}
MODES = {
    "fp32": (torch.float32, None),
    "bf16 weights": (torch.bfloat16, None),
    "autocast": (torch.float32, torch.bfloat16),
}


def make(family, mode):
    dtype, autocast = MODES[mode]
    inner = {} if family == "gpt2" else {"intermediate_size": 384}
    return Backbone(tiny.make_model(family, dtype, **WIDTHS[family], **inner), autocast=autocast)


def measured(backbone):
    """Bytes a token that autograd keeps of pairs of another shape than the estimate's."""
    groups = [Group((5,) * 60, ((6,) * 80, (7,) * 60)), Group((5,) * 40, ((6,) * 70, (7,) * 90))]
    few, many = pack(groups), pack(groups * 2)
    kept = [footprint.kept_bytes(lambda b=batch: backbone(b), backbone) for batch in (few, many)]
    return (kept[1] - kept[0]) / (len(many.input_ids) - len(few.input_ids))


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True], ids=["whole", "checkpointed"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", WIDTHS)
def test_activations_are_what_autograd_keeps(family, mode, checkpointing):
    backbone = make(family, mode)
    layers = backbone.lm.config.num_hidden_layers
    found = footprint.of_module(backbone, "cpu")
    expected = found.of_token(layers, checkpointing)
    if checkpointing:
        backbone.checkpoint_activations()
        expected -= found.layer  # which is there in the backward pass only
        if family not in ("gpt2", "gemma3"):
            # rotary tables: held as a layer's arguments, of which autograd knows nothing
            dtype, head_size = MODES[mode][0], backbone.lm.config.head_dim
            expected -= 2 * head_size * dtype.itemsize
    assert measured(backbone) == pytest.approx(expected, rel=0.1)


def test_a_llama_s_layer_on_cuda_by_hand():
    """SmolLM2-135M's: width h, inner m, queries q and keys k wide; a token's keys are gathered 1.25
    times, and attention keeps fp32 logarithms of 9 heads.
    """
    h, m, q, k = 576, 1536, 576, 192
    config = transformers.LlamaConfig(
        hidden_size=h,
        intermediate_size=m,
        num_attention_heads=9,
        num_key_value_heads=3,
        num_hidden_layers=30,
        vocab_size=49152,
    )
    log_sums = 4 * 9
    attended = q + 1.25 * 2 * k + q  # queries, gathered keys and values, what comes out
    # A norm keeps its input in fp32, 1 / root, and what it is multiplied with the weight by; products
    # keep their input, silu its own, and gate * up both.
    roots = 2 * 4
    expected = {
        # bf16 weights: norms (4 + 2) h, and the products' inputs: h, h, and 4 m
        ("bf16", 2): 2 * (6 * h + 2 * h) + roots + 2 * attended + log_sums + 2 * 4 * m,
        # autocast: the residual stream and the norms are fp32, (4 + 4) h, and each of q, k, v, gate
        # and up has a bf16 copy of its input
        ("bf16", 0): 2 * 8 * h + 5 * 2 * h + roots + 2 * attended + log_sums + 2 * 4 * m,
        ("fp32", 0): 2 * (8 * h + 4 * h) + roots + 4 * attended + log_sums + 4 * 4 * m,
    }
    for (precision, stage), bytes_a_token in expected.items():
        found = footprint.of_config(config, precision, stage)
        assert found.layer == pytest.approx(bytes_a_token, rel=0.01), (precision, stage)
        # checkpointing keeps the residual stream, which is fp32 but for bf16 weights
        assert found.layer_input == (2 if stage else 4) * h
    assert config.num_hidden_layers == 30  # is left as it was


def test_layers_that_look_at_values_count_as_a_dense_model_of_their_sizes():
    sizes = dict(tiny.SIZES, num_key_value_heads=2, **tiny.SPECIAL_TOKENS)
    sizes |= dict(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=48)
    config = transformers.Qwen3MoeConfig(**sizes, head_dim=16)
    experts = Backbone(transformers.AutoModelForCausalLM.from_config(config))
    dense = Backbone(
        tiny.make_model("llama")
    )  # whose inner size is 96, as that of two experts of 48
    assert footprint.of_module(experts, "cuda") == footprint.of_module(dense, "cuda")


def test_torch_s_generator_stays_where_it_is():
    backbone = make("llama", "fp32")
    before = torch.get_rng_state()
    footprint.of_module(backbone, "cuda")
    assert torch.equal(torch.get_rng_state(), before)


def test_states_add_up_to_the_paper_s():
    """ZeRO's figure 1: 7.5B weights over 64 GPUs, 120 GB, 31.4, 16.6 and 1.9, with bf16 gradients of 2
    bytes; here they are summed in fp32, 4 bytes.
    """
    weights = 7.5e9
    totals = [footprint.states(weights, stage, "bf16", 64).total / 1e9 for stage in (1, 2, 3)]
    of_paper = [31.4, 16.6, 1.9]
    more = [2 * 7.5, 2 * 7.5 / 64, 2 * 7.5 / 64]
    for total, expected, added in zip(totals, of_paper, more, strict=True):
        assert total == pytest.approx(expected + added, abs=0.1)
    assert footprint.states(weights, 0, "bf16", 64).total == 16 * weights
    assert footprint.states(weights, 2, "fp32", 1).total == 20 * weights
