"""What the user watches: the progress bar, TensorBoard, and the machine's share of its peak."""

import contextlib
import logging
import os
import re
import time
from pathlib import Path

import torch
from tqdm import tqdm

from train.engine import dist
from train.engine.export import to_disk

# Dense bf16 matrix throughput from the makers' data sheets, in FLOP/s; other machines are measured
# at the start.
PEAKS = {"A100": 312e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12,
         "H20": 148e12, "B200": 2250e12, "A10G": 70e12, "A10": 125e12, "L40S": 362e12, "L40": 181e12,
         "L4": 121e12, "RTX 4090": 165e12, "V100": 125e12}  # fmt: skip

EVENTS = re.compile(
    r"events\.out\.tfevents\.\d+\."
)  # as TensorBoard names its files: the second, host, process


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
        _wait(device)
        start = time.perf_counter()
        a @ a
        _wait(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def _wait(device):
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


class Board:
    """Scalars, histograms and texts to TensorBoard, one bar on the terminal. Only rank 0 writes;
    all may call.
    """

    def __init__(self, folder: Path, total: int, start: int = 0, quiet: bool = False):
        self.writer, self.folder, self.older = None, folder, []
        if dist.first():
            from torch.utils.tensorboard import SummaryWriter

            self.older = self._files()
            for path in self.older[
                -1:
            ]:  # files are read in the order of their names, which hold whole seconds
                time.sleep(min(max(0, int(path.name.split(".")[3]) + 1 - time.time()), 2))
            if not start:
                self.cut({})
            # for a TensorBoard that is looking on: what an interrupted run wrote of later steps
            # does not count
            self.writer = SummaryWriter(str(folder), purge_step=start + 1 if start else 0)
        hidden = quiet or not dist.first()
        self.bar = tqdm(
            total=total,
            initial=start,
            desc="train",
            unit="step",
            disable=hidden,
            dynamic_ncols=True,
        )

    def scalars(self, values: dict[str, float], step: int, prefix: str = ""):
        """Write each value under prefix + name."""
        if self.writer:
            for name, value in values.items():
                self.writer.add_scalar(prefix + name, value, step)

    def histogram(self, name: str, values: torch.Tensor, step: int):
        """Write the distribution of `values`, any shape; nothing where there are none."""
        if self.writer and values.numel():
            self.writer.add_histogram(name, values, step)

    def text(self, name: str, value: str, step: int = 0):
        """Write Markdown."""
        if self.writer:
            self.writer.add_text(name, value, step)

    def hparams(self, flags: dict, results: dict[str, float], step: int):
        """Write the run's flags and its results after `step` to the HPARAMS page, in the same run
        as the curves.
        """
        if self.writer:
            plain = {
                k: v if isinstance(v, bool | int | float | str) else str(v)
                for k, v in flags.items()
            }
            self.writer.add_hparams(plain, results, run_name=".", global_step=step)

    def advance(self, shown: dict[str, str]):
        """One step on, with these figures beside the bar."""
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update()

    def flush(self):
        """Hand everything written to the operating system."""
        if self.writer:
            self.writer.flush()

    def sync(self):
        """The same, onto the disk: a checkpoint counts on it."""
        self.flush()
        for path in self._files()[-1:] if self.writer else ():
            to_disk(path)

    def _files(self):
        return sorted(path for path in self.folder.glob("*") if EVENTS.match(path.name))

    def position(self) -> dict[str, int]:
        """The bytes of each event file by now: what `cut` keeps. {} where this rank writes none."""
        self.flush()
        found = {}
        for path in self._files() if self.writer else ():
            with contextlib.suppress(OSError):
                found[path.name] = path.stat().st_size
        return found

    def cut(self, position: dict[str, int]):
        """Take out of the files that stood here before what came after `position`, so that nothing
        is told twice.

        A file that came wholly after it stays under a name that TensorBoard does not read.
        """
        for path in self.older:
            try:
                if path.name not in position:
                    path.rename(
                        path.with_name(path.name.replace("events.out.tfevents", "set-aside"))
                    )
                elif path.stat().st_size > position[path.name]:
                    os.truncate(path, position[path.name])
            except OSError as error:  # a chart is no reason to stop
                logging.getLogger("zeropref").warning(
                    "%s may show some steps twice: %s", path, error
                )

    def close(self):
        """Flush and end."""
        self.bar.close()
        if self.writer:
            self.writer.close()


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
            (counters["tokens"], counters["flops"]) if dist.first() else (0, 0)
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
        _wait(self.device)
        at = time.perf_counter()
        yield
        _wait(self.device)
        self.began += time.perf_counter() - at

    def read(self) -> tuple[torch.Tensor, dict[str, float]]:
        """The sums over all ranks since the last reading, (columns,), and `perf/*`. Every rank
        calls this.
        """
        work = torch.tensor([self.tokens, self.flops], dtype=torch.float64, device=self.device)
        sums = dist.total(torch.cat([self.sums, work])).cpu()
        now = time.perf_counter()
        seconds, self.began = now - self.began, now
        self.sums.zero_()
        self.tokens = self.flops = 0
        tokens, flops = sums[-2:].tolist()
        perf = {
            "perf/pairs_per_second": float(sums[0]) / seconds,
            "perf/tokens_per_second": tokens / seconds,
            "perf/mfu": flops / seconds / (self.peak * dist.world()),
            "perf/memory_gb": peak_memory(self.device),
        }
        return sums[: self.columns], perf

    def values(self) -> torch.Tensor:
        """Everything kept since this was last asked, of all ranks, (m, c) on the CPU. Every rank
        calls this.
        """
        mine = torch.cat(self.kept).cpu() if self.kept else torch.empty(0, 0)
        self.kept = []
        parts = [part for part in dist.gather(mine) if part.numel()]
        return torch.cat(parts) if parts else torch.empty(0, 1)
