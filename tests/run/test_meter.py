"""What a share of the machine's peak is measured against."""

import itertools
from types import SimpleNamespace

import pytest
import torch

from train.run import meter


@pytest.mark.parametrize("threads", [1, 3])
def test_a_cpu_s_peak_is_that_of_its_threads_whatever_else_runs(monkeypatch, threads):
    """Others have the machine while it is measured: by the wall clock a product takes a thousand
    seconds. Of what one thread itself takes for it the best counts, for each thread.
    """
    took = iter([5.0, 3.0, 4.0, 6.0, 7.0, 4.0, 4.0, 2.0, 6.0, 5.0])  # by MKL, by oneDNN
    clock = [0.0]

    def thread_time(calls=itertools.count()):  # noqa: B008 (one count for all calls)
        assert torch.get_num_threads() == 1
        if next(calls) % 2:
            clock[0] += next(took)
        return clock[0]

    hours = itertools.count(step=1000)
    clocks = SimpleNamespace(thread_time=thread_time, perf_counter=lambda: next(hours))
    monkeypatch.setattr(meter, "time", clocks)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        peak = meter.peak_flops(torch.device("cpu"), torch.float32)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert peak == threads * 2 * 1024**3 / 2.0


@pytest.mark.parametrize(
    "name, peak",
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", 7.0),
        ("NVIDIA GH200 480GB", 7.0),
    ],
)
def test_a_gpu_s_peak_by_its_name(monkeypatch, name, peak):
    """Of those that have none of their own it is measured."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(meter, "_flops_of_product", lambda *_: 7.0)
    assert meter.peak_flops(torch.device("cuda"), torch.bfloat16) == peak
    assert meter.peak_flops(torch.device("cuda"), torch.float32) == 7.0
