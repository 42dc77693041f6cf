"""Training and decoding on a GPU that is not there: see pretend.py for what that proves.

All cases run in one process of their own, once; each test looks at the line of one of them.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cuda_pretend import pretend
from tests.cuda_pretend.cases import CASES, FAMILIES

HERE = Path(__file__).resolve().parent
REASON = pretend.why_not()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(REASON is not None, reason=f"no pretend CUDA: {REASON}"),
]

# Kernels that one more layer launches, at most: of the reference (whose matrices are bf16 already),
# the policy's forward and its backward. As measured; a change that needs more says so here.
LAUNCHES_A_LAYER = {
    "llama": (43, 50, 109),
    "llama_lora": (43, 101, 156),
    "llama_checkpointing": (43, 50, 157),
    "qwen3": (59, 66, 139),
    "gemma": (45, 52, 101),
    "gemma3": (88, 95, 165),
    "mistral_window": (43, 50, 109),
    "gpt2": (32, 32, 63),
    "phi3": (40, 44, 106),
}
# Around the layers of a step: head, embedding and rotary angles not counted.
LAUNCHES_A_STEP = {"loss": 20, "measures": 42}
# Forward and backward of one more layer where the flash kernel does not apply, at most.
LAUNCHES_WITHOUT_FLASH = {"fp32": 156, "fp32_window": 245, "before_sm80": 199, "odd_heads": 199}
# Nodes of a body of two layers as one graph, forward and backward, at most.
NODES = {
    "llama": (243, 460),
    "qwen3": (283, 552),
    "gemma3": (347, 636),
    "mistral_window": (243, 460),
}

# Kernels of one more token of a body of two layers, with head, draw and bookkeeping, at most.
LAUNCHES_A_TOKEN = {"llama": 194, "qwen3": 226, "gpt2": 144}
# Operations of two decoder layers over a batch in its bucket, forward, at most; and nodes of a compiled
# layer, forward and backward, of each kind of layer there is.
STATIC = {
    "llama": (190, [115, 220]),
    "qwen3": (226, [135, 266]),
    "gemma3": (274, [161, 161, 307, 307]),  # with a window and without
    "mistral_window": (190, [115, 220]),
    "gpt2": (116, [90, 145]),
    "llama_lora": (375, [221, 222, 347, 290]),  # to the first layer's input no gradient goes
}
# Kernels that a compiled layer launches at most, of each kind of layer there is: forward, then backward.
COMPILED = {
    "llama (8, 0)": [21, 36],
    "llama (9, 0)": [21, 36],
    "reference (8, 0)": [14],
    "qwen3 (8, 0)": [23, 39],
    "gemma3 (8, 0)": [23, 23, 41, 41],
    "mistral_window (8, 0)": [22, 36],
    "gpt2 (8, 0)": [19, 33],
    "llama_lora (8, 0)": [52, 52, 62, 55],  # to the first layer's input no gradient goes
}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What came out of each case, by its name."""
    command = [sys.executable, HERE / "run_cases.py", tmp_path_factory.mktemp("guard")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert done.returncode == 0, done.stderr[-3000:]
    return {line["case"]: line for line in lines}


@pytest.mark.parametrize("name", CASES)
def test_it_runs_and_the_host_never_waits(found, name):
    assert found[name]["error"] is None, found[name]["error"]
    assert found[name]["waits"] == []


def test_what_may_wait_does(found):
    """A place that does not wait any more is taken off the list."""
    from tests.cuda_pretend.cases import MAY_WAIT

    seen = {wait.split(" ")[0] for line in found.values() for wait in line["allowed"]}
    assert seen == set(MAY_WAIT)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_launches_no_more_than_it_did(found, family):
    facts = found[f"step_{family}"]["facts"]
    launches = facts["layer"]["launches"]
    measured = tuple(launches[phase] for phase in ("reference", "forward", "backward"))
    assert all(now <= most for now, most in zip(measured, LAUNCHES_A_LAYER[family], strict=True)), (
        measured
    )
    for phase, most in LAUNCHES_A_STEP.items():
        assert facts["step"][phase] <= most


@pytest.mark.parametrize("what", LAUNCHES_WITHOUT_FLASH)
def test_without_flash_attention_is_one_call_a_layer(found, what):
    launches, names = found["other_kernels"]["facts"][what]
    assert not any("varlen" in name for name in names)
    # 22 responses: one at a time they would be several hundred
    assert launches <= LAUNCHES_WITHOUT_FLASH[what]


@pytest.mark.parametrize("family", ["llama", "mistral_window", "llama_checkpointing"])
def test_deterministic_is_for_the_attention_kernel_alone(found, family):
    facts = found["deterministic"]["facts"]
    for asked in (False, True):
        backwards, with_atomics = facts[f"{family} {asked}"]
        name = "varlen_backward_in_order" if asked else "_varlen_attn_backward"
        assert backwards == {name: 2} and with_atomics == 0  # one a layer


@pytest.mark.parametrize("family", LAUNCHES_A_TOKEN)
def test_tokens_are_drawn_without_a_look_in_between(found, family):
    facts = found["decoding"]["facts"][family]
    # 40 tokens: 39 forward passes behind the prompts'; the host looks after tokens 16 and 32
    assert [i for i, waits in enumerate(facts["waits"]) if waits] == [14, 30]
    # the same operations on the same shapes for one position and the next, but around those
    assert [i for i, same in enumerate(facts["same"]) if not same] == [13, 14, 29, 30]
    assert facts["launches"] <= LAUNCHES_A_TOKEN[family]


@pytest.mark.parametrize("family", STATIC)
def test_batches_of_a_bucket_are_one_trace_and_one_graph_a_layer(found, family):
    facts = found["static_shapes"]["facts"]
    one, other = facts["buckets"]
    assert one == other
    assert facts[family]["same"]  # operations, shapes and dtypes, in order
    operations, nodes = STATIC[family]
    assert facts[family]["operations"] <= operations
    # fullgraph raises where a layer is more than one; two layers and two batches come to these
    measured = facts[family]["nodes"]
    assert all(now <= most for now, most in zip(measured, nodes, strict=True)), measured


def test_updates_of_a_rollout_wait_at_its_end_alone(found):
    facts = found["updates"]["facts"]
    assert set(facts) == {"grpo 0", "ppo 0", "ppo 1e+09"}
    assert all(ends == [["train/engine/later.py:read (event)"]] * 2 for ends in facts.values())


def test_without_flash_layers_stay_uncompiled(found):
    assert "flash" in found["static_shapes"]["facts"]["fp32"]


@pytest.mark.parametrize("family", NODES)
def test_a_body_is_one_graph(found, family):
    forward, backward = found["fullgraph"]["facts"][family]  # two graphs: fullgraph raises on more
    assert forward <= NODES[family][0] and backward <= NODES[family][1]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma", "gemma3", "mistral_window", "gpt2"])
def test_memory_is_what_autograd_keeps(found, family):
    facts = found["memory"]["facts"]
    for mode in ("autocast", "bf16", "checkpointing"):
        kept, estimate = facts[f"{family}, {mode}"]
        assert estimate == pytest.approx(kept, rel=0.1), mode


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_layers_are_built_for_the_gpu(found, name):
    """Inductor's kernels, by Triton and ptxas; nothing runs them."""
    facts = found["machine_code"]["facts"]
    if "reason" in facts:
        pytest.skip(facts["reason"])
    graphs = facts[name]
    measured = [len(graph) for graph in graphs]
    assert all(now <= most for now, most in zip(measured, COMPILED[name], strict=True)), measured
    for kernels in graphs:
        assert kernels.count("_varlen_attn") + kernels.count("_varlen_attn_backward") == 1
