"""Ranks: who this process is, and the few collectives that the scripts need.

Works launched by `deepspeed`, `torchrun`, `srun` (one task a GPU) and plain `python`.
"""

import contextlib
import ctypes
import datetime
import os
import socket

import torch
import torch.distributed as td

TIMEOUT = datetime.timedelta(minutes=30)
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def init() -> torch.device:
    """Join the job's process group through DeepSpeed and choose this rank's device. Every rank
    calls this.
    """
    cuda = torch.cuda.is_available()
    if not cuda:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed looks for one, and says so
    import deepspeed

    _environment()
    if cuda:  # under srun --gpus-per-task=1 each task sees one GPU, whatever its number
        os.environ["LOCAL_RANK"] = str(local_rank() % torch.cuda.device_count())
    device = torch.device("cuda", local_rank()) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    else:
        _keep_pages()
    deepspeed.init_distributed(
        dist_backend="nccl" if cuda else "gloo",
        auto_mpi_discovery=False,
        verbose=False,
        timeout=TIMEOUT,
    )
    return device


def shutdown():
    """Leave the process group, so that the interpreter ends without complaint."""
    if td.is_initialized():
        td.destroy_process_group()


def _keep_pages():
    """Let glibc keep what is freed for the next tensor: handed back and faulted in again, pages
    cost a CPU step 5 %.
    """
    if hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(
            M_MMAP_THRESHOLD, 32 << 20
        )  # the most it takes; larger tensors come and go by themselves
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def _environment():
    """Fill in RANK and its kin where the launcher has not: from srun's variables, or for a process
    on its own.
    """
    env = os.environ
    if "RANK" in env:
        return
    if "SLURM_PROCID" in env and int(env.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        env["RANK"], env["WORLD_SIZE"] = env["SLURM_PROCID"], env["SLURM_STEP_NUM_TASKS"]
        env["LOCAL_RANK"] = env["SLURM_LOCALID"]
        env.setdefault("MASTER_ADDR", _first_host(env["SLURM_STEP_NODELIST"]))
        env.setdefault("MASTER_PORT", str(20000 + int(env["SLURM_JOB_ID"]) % 20000))
        return
    env.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    env.setdefault("MASTER_ADDR", "127.0.0.1")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        env.setdefault("MASTER_PORT", str(probe.getsockname()[1]))


def _first_host(nodes: str) -> str:
    """The first name in SLURM's list: "gpu[03-05,9],x1" -> "gpu03"."""
    name, bracket, rest = nodes.partition(",")[0].partition("[")
    return name + rest.rstrip("]").split("-")[0] if bracket else name


def rank() -> int:
    """This process's number over all nodes."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """How many processes take part."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """This process's number on its node, which is its GPU's."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def is_main() -> bool:
    """Whether this is the rank that prints, logs and writes what is written once."""
    return rank() == 0


def barrier():
    """Wait for all. Every rank calls this."""
    if world_size() > 1:
        td.barrier()


def all_reduce(values: torch.Tensor) -> torch.Tensor:
    """The sum of `values` over ranks, in place. Every rank calls this."""
    if world_size() > 1:
        td.all_reduce(values)
    return values


def broadcast(thing=None):
    """Rank 0's `thing` (anything that pickles) on every rank. Every rank calls this."""
    if world_size() == 1:
        return thing
    box = [thing]
    td.broadcast_object_list(box, src=0)
    return box[0]


def all_gather(thing) -> list:
    """Every rank's `thing`, in order of rank, on every rank. Every rank calls this."""
    if world_size() == 1:
        return [thing]
    box = [None] * world_size()
    td.all_gather_object(box, thing)
    return box


class Heartbeats:
    """Signs of life of all ranks, in the store they met through; used by one thread, beside any
    collective.
    """

    def __init__(self):
        self.store = td.distributed_c10d._get_default_store().clone()
        self.name = lambda rank: f"zeropref/beat/{rank}"

    def exchange(self, beat) -> dict[int, str]:
        """Leave this rank's and read everybody's: rank -> its last, "" before its first."""
        self.store.set(self.name(rank()), str(beat))
        known = [other for other in range(world_size()) if self.store.check([self.name(other)])]
        return {other: self.store.get(self.name(other)).decode() for other in known}


@contextlib.contextmanager
def main_process_first():
    """Rank 0 runs the block first, then the others, who find its caches filled. Every rank enters
    this.

    An error on rank 0 is raised on the others too, so that nobody waits for a dead peer.
    """
    if not is_main():
        error = broadcast()
        if error is not None:
            raise error
        yield
        return
    try:
        yield
    except Exception as error:
        broadcast(error)
        raise
    broadcast(None)
