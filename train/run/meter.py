"""Throughput, memory and the machine's share of its peak, summed up between two readings."""

import contextlib
import re
import resource
import time
from collections.abc import Callable

import torch

from train.engine import dist
from train.engine.later import Later
from train.models.matmul import matmul_transposed

# Dense bf16 matrix throughput from the makers' data sheets, in FLOP/s; other machines are measured
# at the start.
PEAKS = {"A100": 312e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12,
         "H20": 148e12, "B200": 2250e12, "A10G": 70e12, "A10": 125e12, "L40S": 362e12, "L40": 181e12,
         "L4": 121e12, "RTX 4090": 165e12, "V100": 125e12}  # fmt: skip


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s that MFU is a share of: the data sheet's for known GPUs in half precision, else those of a
    measured matrix product.
    """
    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        name = torch.cuda.get_device_name(device)
        for known, peak in PEAKS.items():
            # a slice of a card (MIG) is named by both, and has its own part of the card's
            if re.search(rf"\b{known}\b", name) and not re.search(r"\bMIG\b", name):
                return peak
    if device.type == "cpu":
        return _peak_of_threads(dtype)
    return _flops_of_product(4096, device, dtype, time.perf_counter)


def _peak_of_threads(dtype: torch.dtype) -> float:
    """FLOP/s of one of this process's threads, times their number.

    By the time that the thread itself computes: whatever else runs on the machine makes a wall clock's
    peak too low, and shares of it larger than 1.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return threads * _flops_of_product(1024, torch.device("cpu"), dtype, time.thread_time)
    finally:
        torch.set_num_threads(threads)


def _flops_of_product(size: int, device, dtype, clock: Callable[[], float]) -> float:
    """FLOP/s of a product of square matrices, the best of five by each library that layers use."""
    a = torch.randn(size, size, device=device, dtype=dtype)
    best = float("inf")
    for product in (torch.mm, matmul_transposed):
        for _ in range(5):
            _synchronize(device)
            start = clock()
            product(a, a)
            _synchronize(device)
            best = min(best, clock() - start)
    return 2 * size**3 / best


def _synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(device: torch.device) -> float:
    """The most memory this process has held, in GB.

    On CUDA the allocator's, on a CPU the resident set.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9  # Linux counts in KiB


class Meter:
    """Sums over batches: measures stay on the device, throughput comes from the clock, until read."""

    def __init__(self, columns: int, device: torch.device, peak: float):
        """columns: of the measures that are summed, the first of which counts examples. peak: FLOP/s
        of one device.
        """
        self.sums = torch.zeros(columns, dtype=torch.float64, device=device)  # (columns,)
        self.columns, self.device, self.peak = columns, device, peak
        self.tokens = 0
        self.flops = 0
        self.kept = []  # tensors (m, c) of values an example
        self.began = time.perf_counter()

    def add(self, sums: torch.Tensor, tokens: int, flops: float, kept: torch.Tensor | None = None):
        """Add a batch's measures (columns,), its tokens and operations.

        kept: (m, c), values of each example, for histograms.
        """
        self.sums += sums
        self.tokens += tokens
        self.flops += flops
        if kept is not None:
            self.kept.append(kept)

    def state_dict(self) -> dict:
        """Counters of what is not read yet, for JSON."""
        seconds = time.perf_counter() - self.began
        return {"tokens": self.tokens, "flops": self.flops, "seconds": seconds}

    def load_state_dict(self, state: dict):
        """Continue from `state_dict`, whose counts are all ranks' together: the first goes on."""
        self.tokens, self.flops = state["tokens"], state["flops"]
        if not dist.is_main():
            self.tokens, self.flops = 0, 0
        self.began = time.perf_counter() - state["seconds"]

    def rank_tensors(self) -> Callable[[], dict[str, torch.Tensor]]:
        """What makes this rank's tensors of what is not read yet."""
        sums, kept, count = self.sums.clone(), self.kept, len(self.kept)

        def tensors():
            values = {f"meter/kept/{i}": part for i, part in enumerate(kept[:count])}
            values = {key: part for key, part in values.items() if part.numel()}
            return {"meter/sums": sums} | values

        return tensors

    def load_rank_tensors(self, of_ranks: list[dict[str, torch.Tensor]]):
        """Continue from `rank_tensors` of several ranks, or of none."""
        for tensors in of_ranks:
            self.sums += tensors["meter/sums"].to(self.device)
            kept = [key for key in tensors if key.startswith("meter/kept/")]
            kept.sort(key=lambda key: int(key.rpartition("/")[2]))
            self.kept += [tensors[key].to(self.device) for key in kept]

    @contextlib.contextmanager
    def pause(self):
        """Stop the clock for what happens inside: evaluation, saving."""
        _synchronize(self.device)
        paused = time.perf_counter()
        yield
        _synchronize(self.device)
        self.began += time.perf_counter() - paused

    def read(self) -> tuple[torch.Tensor, dict[str, float]]:
        """The sums over all ranks since the last reading, (columns,), and `perf/*`.

        Every rank calls this.
        """
        return self.reading_of(*self.close())

    def close(self) -> tuple[Later, float]:
        """End the interval: the sums over all ranks on their way to the host, and its seconds. What is
        added from here on belongs to the next. Every rank calls this.
        """
        # filled on the device, where a copy of two numbers from the host would wait
        work = [self.sums.new_full((1,), count) for count in (self.tokens, self.flops)]
        sums = Later(dist.all_reduce(torch.cat([self.sums, *work])))
        now = time.perf_counter()
        seconds, self.began = now - self.began, now
        self.sums.zero_()
        self.tokens = 0
        self.flops = 0
        return sums, seconds

    def reading_of(self, sums: Later, seconds: float) -> tuple[torch.Tensor, dict[str, float]]:
        """What `read` gives, of what `close` gave. Waits until the device has come to it."""
        sums = sums.read()
        tokens, flops = sums[-2:].tolist()
        perf = {
            "perf/pairs_per_second": float(sums[0]) / seconds,
            "perf/tokens_per_second": tokens / seconds,
            "perf/mfu": flops / seconds / (self.peak * dist.world_size()),
            "perf/memory_gb": peak_memory(self.device),
        }
        return sums[: self.columns], perf

    def values(self) -> torch.Tensor:
        """Everything kept since this was last asked, of all ranks, (m, c) on the CPU.

        Every rank calls this.
        """
        mine = torch.cat(self.kept).cpu() if self.kept else torch.empty(0, 0)
        self.kept = []
        parts = [part for part in dist.all_gather(mine) if part.numel()]
        return torch.cat(parts) if parts else torch.empty(0, 1)
