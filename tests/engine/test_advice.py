"""Advice by size: README's table is what the function prints, and its arithmetic by hand."""

from pathlib import Path

import pytest

from tests.cuda_pretend.test_pretend import LAUNCHES_A_LAYER
from train.engine import advice

README = Path(__file__).resolve().parents[2] / "README.md"


def test_readme_s_table_is_what_is_computed():
    assert advice.table() in README.read_text()


def test_7b_on_a_node_by_hand():
    """Qwen2.5-7B: 7.616e9 weights, of which embeddings and head have 152,064 x 3,584 each."""
    model = advice.Model(advice.MODELS["7B"])
    head = 152064 * 3584
    assert model.weights == pytest.approx(7.616e9, rel=1e-3) and model.head == head
    found = advice.advise(model, 8)
    assert found.way == advice.Way("zero2", checkpointing=True)
    # bf16 weights, fp32 masters, gradients and moments by eight, the reference in bf16
    states = 2 + (4 + 4 + 8) / 8 + 2
    buckets = 2 * (1e8 + 1e8 + 1e8)
    in_backward = 2 * 80e9 / 40 + (4 + 2) * head  # 2 GB of logits, twice
    assert found.fixed == pytest.approx(states * model.weights + buckets + in_backward)
    # 28 layers' inputs in bf16, and one layer at a time
    inputs = 28 * 2 * 3584
    assert found.activations / found.tokens > inputs
    # policy forward and backward 3, a second forward 1, the reference 1; 2 FLOP a weight but those of
    # the embeddings, and the head for the answers alone, three in four tokens
    body = model.weights - 2 * head
    flops = 5 * 2 * (body + head * 0.75)
    assert found.tokens_per_second == pytest.approx(8 * 312e12 * 0.4 / flops, rel=0.03)


def test_a_small_model_waits_for_python():
    """Of 135M, a batch of 4,859 tokens takes less time than its operations are launched in."""
    model = advice.Model(advice.MODELS["135M"])
    operations = sum(LAUNCHES_A_LAYER["llama"])  # reference, forward, backward
    seconds = advice._seconds(model, 1, advice.Way("zero0"), 0, False, 4859)
    assert seconds == pytest.approx(30 * operations * 10e-6)


def test_what_does_not_fit_is_said(monkeypatch):
    monkeypatch.setattr(advice, "MEMORY", 6e9)
    monkeypatch.setattr(advice, "MODELS", {"70B": advice.MODELS["70B"]})
    assert "| 70B | 1 | does not fit" in advice.table()
