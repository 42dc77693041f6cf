"""Throughput, memory and the machine's share of its peak, summed up between two readings."""

import contextlib
import re
import time

import torch

from train.engine import dist

# Dense bf16 matrix throughput from the makers' data sheets, in FLOP/s; other machines are measured
# at the start.
PEAKS = {"A100": 312e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12,
         "H20": 148e12, "B200": 2250e12, "A10G": 70e12, "A10": 125e12, "L40S": 362e12, "L40": 181e12,
         "L4": 121e12, "RTX 4090": 165e12, "V100": 125e12}  # fmt: skip


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s that MFU is a share of: the data sheet's for known GPUs in half precision, else a
    measured product's.
    """
    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        name = torch.cuda.get_device_name(device)
        for known, peak in PEAKS.items():
            if re.search(rf"\b{known}\b", name):
                return peak
    size = 4096 if device.type == "cuda" else 1024
    a = torch.randn(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(5):
        _synchronize(device)
        start = time.perf_counter()
        a @ a
        _synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def _synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(device: torch.device) -> float:
    """The most memory this process has held, in GB: the allocator's on CUDA, the resident set on
    CPU.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


class Meter:
    """Sums over rows: measures stay on the device, throughput comes from the clock, until they are
    read.
    """

    def __init__(self, columns: int, device: torch.device, peak: float):
        self.sums = torch.zeros(columns, dtype=torch.float64, device=device)
        self.columns, self.device, self.peak = columns, device, peak
        self.tokens = self.flops = 0
        self.kept = []
        self.began = time.perf_counter()

    def add(self, sums: torch.Tensor, tokens: int, flops: float, kept: torch.Tensor | None = None):
        """A row's measures (columns,), its tokens and operations; `kept` (m, c): values a pair, for
        histograms.
        """
        self.sums += sums
        self.tokens += tokens
        self.flops += flops
        if kept is not None:
            self.kept.append(kept)

    def state(self):
        """What is not read yet: counters for JSON, and what makes this rank's tensors of them."""
        sums, kept, count = self.sums.clone(), self.kept, len(self.kept)
        counters = {
            "tokens": self.tokens,
            "flops": self.flops,
            "seconds": time.perf_counter() - self.began,
        }

        def tensors():
            values = {
                f"meter/kept/{i}": part for i, part in enumerate(kept[:count]) if part.numel()
            }
            return {"meter/sums": sums} | values

        return counters, tensors

    def load(self, counters: dict, parts: list[dict]):
        """Continue from `state`, with the tensors of several ranks or of none."""
        self.tokens, self.flops = (
            (counters["tokens"], counters["flops"]) if dist.is_main() else (0, 0)
        )
        self.began = time.perf_counter() - counters["seconds"]
        for part in parts:
            self.sums += part["meter/sums"].to(self.device)
            kept = {
                int(key.rpartition("/")[2]): value
                for key, value in part.items()
                if key.startswith("meter/kept/")
            }
            self.kept += [kept[i].to(self.device) for i in sorted(kept)]

    @contextlib.contextmanager
    def pause(self):
        """The clock does not count what happens inside: evaluation, saving."""
        _synchronize(self.device)
        at = time.perf_counter()
        yield
        _synchronize(self.device)
        self.began += time.perf_counter() - at

    def read(self) -> tuple[torch.Tensor, dict[str, float]]:
        """The sums over all ranks since the last reading, (columns,), and `perf/*`. Every rank
        calls this.
        """
        work = torch.tensor([self.tokens, self.flops], dtype=torch.float64, device=self.device)
        sums = dist.all_reduce(torch.cat([self.sums, work])).cpu()
        now = time.perf_counter()
        seconds, self.began = now - self.began, now
        self.sums.zero_()
        self.tokens = self.flops = 0
        tokens, flops = sums[-2:].tolist()
        perf = {
            "perf/pairs_per_second": float(sums[0]) / seconds,
            "perf/tokens_per_second": tokens / seconds,
            "perf/mfu": flops / seconds / (self.peak * dist.world_size()),
            "perf/memory_gb": peak_memory(self.device),
        }
        return sums[: self.columns], perf

    def values(self) -> torch.Tensor:
        """Everything kept since this was last asked, of all ranks, (m, c) on the CPU. Every rank
        calls this.
        """
        mine = torch.cat(self.kept).cpu() if self.kept else torch.empty(0, 0)
        self.kept = []
        parts = [part for part in dist.all_gather(mine) if part.numel()]
        return torch.cat(parts) if parts else torch.empty(0, 1)
