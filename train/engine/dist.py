"""Ranks: who this process is, and the few collectives that the scripts need.

Works launched by `deepspeed`, `torchrun`, `srun` (one task a GPU) and plain `python`.
"""

import contextlib
import ctypes
import datetime
import os
import socket
import sys
from typing import NamedTuple

import deepspeed
import torch
import torch.distributed as td

from train import quiet
from train.engine import leftovers

TIMEOUT = datetime.timedelta(minutes=30)
# Of what ranks wait for that is no computation: rank 0 may tokenise for hours. Whoever dies meanwhile
# is noticed by its connection, and by engine/preemption.py.
PATIENCE = datetime.timedelta(hours=24)
# How many processes an MPI has started, as OpenMPI, MPICH and Intel, and MVAPICH say it.
MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
# the group of ranks that objects, barriers and tensors in main memory go through, by gloo
_objects = None
# of glibc's malloc.h
M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3


def init() -> torch.device:
    """Join the job's process group through DeepSpeed and choose this rank's device.

    ValueError where the port that the ranks meet at is taken, or a network named that is not there,
    and where two ranks have one GPU. Every rank calls this.
    """
    global _objects
    cuda = torch.cuda.is_available()
    _set_environment()
    refuse_missing_interfaces()
    share_cores()
    if cuda:  # under srun --gpus-per-task=1 each task sees one GPU, whatever its number
        os.environ["LOCAL_RANK"] = str(local_rank() % torch.cuda.device_count())
    device = torch.device("cuda", local_rank()) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    else:
        _keep_pages()
    leftovers.remove_dead_build_locks()
    try:
        with quiet.prints_off():  # "... built successfully"
            deepspeed.init_distributed(
                dist_backend="nccl" if cuda else "gloo",
                auto_mpi_discovery=False,
                verbose=False,
                timeout=TIMEOUT,
            )
    except td.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        port = os.environ["MASTER_PORT"]
        raise ValueError(
            f"port {port} is taken on this machine, by another run it may be: start with "
            f"deepspeed --master_port {int(port) + 1} ... (torchrun's flag has the same name)"
        ) from error
    if world_size() > 1:
        _objects = td.new_group(backend="gloo", timeout=PATIENCE)
    if cuda:
        gpus = all_gather(gpu_of(device))
        refuse_shared_gpus(gpus, torch.cuda.device_count())
        if is_main() and (line := about_slices(gpus)):
            print(line, file=sys.stderr)
    else:
        barrier()  # now every rank has opened the others' buffers
        leftovers.unlink_shared_memory(rank())
    return device


def share_cores():
    """Give each rank of a machine its share of the cores, where OMP_NUM_THREADS says nothing: deepspeed
    lets each take all of them, and two ranks on two cores are then six times slower.
    """
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
    if ranks > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() // ranks))


def refuse_missing_interfaces():
    """ValueError where GLOO_SOCKET_IFNAME names a network that this machine lacks. Rank 0 says so for
    its machine, of another one the first rank there.
    """
    wanted = os.environ.get("GLOO_SOCKET_IFNAME", "")
    known = [name for _, name in socket.if_nameindex()]
    missing = [name for name in wanted.split(",") if wanted and name not in known]
    if missing:
        said = (
            f"GLOO_SOCKET_IFNAME names {', '.join(missing)}, a network that {socket.gethostname()} does "
            f"not have: it has {', '.join(known)}"
        )
        if not is_main() and local_rank() == 0:
            print(f"error: {said}", file=sys.stderr)
        raise ValueError(said)


class Gpu(NamedTuple):
    """What a rank computes on: a GPU, or one of the slices that a GPU is cut into (MIG)."""

    host: str
    uuid: str  # as CUDA says it, the whole card's or the slice's
    slice: str = ""  # MIG-..., by which CUDA_VISIBLE_DEVICES names it; "": a whole GPU


def gpu_of(device: torch.device) -> Gpu:
    """What this rank has of its machine."""
    uuid = str(torch.cuda.get_device_properties(device).uuid)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    name = visible[device.index].strip() if device.index < len(visible) else ""
    return Gpu(socket.gethostname(), uuid, name if name.startswith("MIG-") else "")


def refuse_shared_gpus(gpus: list[Gpu], count: int):
    """ValueError where two ranks have one GPU, or one slice of it. gpus: of each rank; count: how many
    this rank sees.
    """
    first = {}
    for number, gpu in enumerate(gpus):
        if gpu in first:
            if gpu.slice:
                raise ValueError(
                    f"ranks {first[gpu]} and {number} share {gpu.slice} of {gpu.host}, one MIG slice: give "
                    "each rank a CUDA_VISIBLE_DEVICES of its own (srun --gpus-per-task=1), or start one "
                    "rank"
                )
            raise ValueError(
                f"ranks {first[gpu]} and {number} share one GPU of {gpu.host}, where a rank sees "
                f"{count}: start one process a GPU (deepspeed --num_gpus, torchrun "
                "--nproc_per_node, srun --gpus-per-task=1)"
            )
        first[gpu] = number


def about_slices(gpus: list[Gpu]) -> str | None:
    """What a user may have to know whose ranks have several slices of one card; None: nothing."""
    hosts = [gpu.host for gpu in gpus if gpu.slice]
    if len(set(hosts)) == len(hosts) or "NCCL_MULTI_RANK_GPU_ENABLE" in os.environ:
        return None
    return (
        "ranks are on MIG slices: if NCCL refuses two of one card (Duplicate GPU detected), set "
        "NCCL_MULTI_RANK_GPU_ENABLE=1 with NCCL 2.30 or newer, or start one rank"
    )


def shutdown():
    """Leave the process group, so that the interpreter ends without complaint."""
    global _objects
    _objects = None
    if td.is_initialized():
        td.destroy_process_group()


def _keep_pages():
    """Let glibc keep what is freed for the next tensor.

    Handed back to the system and faulted in again, pages cost a CPU step 5 %.
    """
    if hasattr(libc := ctypes.CDLL(None), "mallopt"):
        # 32 MB is the most it takes; larger tensors come and go by themselves
        libc.mallopt(M_MMAP_THRESHOLD, 32 << 20)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def _set_environment():
    """Fill in RANK and its kin where the launcher has not.

    From srun's variables, or for a process on its own; ValueError for several that mpirun has started.
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
    for name in MPI_SIZES:
        if int(env.get(name) or 1) > 1:
            raise ValueError(
                f"mpirun has started {env[name]} processes, each of which would train by itself: start "
                "them with deepspeed (--launcher pdsh, its default), torchrun or srun"
            )
    # alone: an address of another machine, which the shell may have, would be waited for in vain
    env.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        env["MASTER_PORT"] = str(probe.getsockname()[1])


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
        td.barrier(group=_objects)


def all_reduce(values: torch.Tensor) -> torch.Tensor:
    """Sum `values` over ranks, in place; returns them. Every rank calls this, with values on the same
    kind of device.
    """
    if world_size() > 1:
        td.all_reduce(values, group=_group_of(values))
    return values


def broadcast(value=None):
    """Rank 0's `value` (anything that pickles) on every rank. Every rank calls this."""
    if world_size() == 1:
        return value
    values = [value]
    td.broadcast_object_list(values, src=0, group=_objects)
    return values[0]


def broadcast_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` with rank 0's values, in place. Every rank calls this, with the same shape."""
    if world_size() > 1:
        td.broadcast(tensor, 0, group=_group_of(tensor))
    return tensor


def _group_of(tensor: torch.Tensor):
    """The group of ranks that a tensor goes through: NCCL, the usual one on GPUs, refuses a tensor that
    lies in main memory.
    """
    return None if tensor.is_cuda else _objects


def all_gather(value) -> list:
    """Every rank's `value` (anything that pickles), in order of rank. Every rank calls this."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size()
    td.all_gather_object(values, value, group=_objects)
    return values


class Heartbeats:
    """Signs of life of all ranks, in the store they met through.

    Used by one thread, beside any collective.
    """

    def __init__(self):
        self._store = td.distributed_c10d._get_default_store().clone()

    def exchange(self, beat) -> dict[int, str]:
        """Leave this rank's beat and read everybody's: rank -> its last one, where it has any."""
        self._store.set(self._key(rank()), str(beat))
        beats = {}
        for other in range(world_size()):
            if self._store.check([self._key(other)]):
                beats[other] = self._store.get(self._key(other)).decode()
        return beats

    @staticmethod
    def _key(rank):
        return f"zeropref/beat/{rank}"


@contextlib.contextmanager
def main_process_first():
    """Rank 0 runs the block first, then the others, who find its caches filled.

    An error on rank 0 is raised on the others too, so that nobody waits for a dead peer. Every rank
    enters this.
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
