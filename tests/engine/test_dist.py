"""Who a process is under each launcher."""

import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from train.engine import dist

ROOT = Path(__file__).resolve().parents[2]

NAMES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "SLURM_PROCID",
    "SLURM_STEP_NUM_TASKS",
    "SLURM_LOCALID",
    "SLURM_STEP_NODELIST",
    "SLURM_JOB_ID",
)


@pytest.fixture
def environ(monkeypatch):
    for name in NAMES:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)

    def put(**values):
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    yield put
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


def test_alone(environ):
    dist._set_environment()
    assert (dist.rank(), dist.world_size(), dist.local_rank(), dist.is_main()) == (0, 1, 0, True)


def test_alone_in_a_shell_that_knows_of_another_job(environ):
    """Whatever it says of where to meet, one process meets itself on its own machine."""
    environ(MASTER_ADDR="gpu03", MASTER_PORT="high", WORLD_SIZE="4", LOCAL_RANK="3")
    dist._set_environment()
    assert (dist.rank(), dist.world_size(), dist.local_rank()) == (0, 1, 0)
    assert os.environ["MASTER_ADDR"] == "127.0.0.1" and int(os.environ["MASTER_PORT"]) > 1023


@pytest.mark.parametrize("name", ["LOCAL_SIZE", "LOCAL_WORLD_SIZE"])
def test_ranks_of_a_machine_share_its_cores(environ, monkeypatch, name):
    """As deepspeed and torchrun say how many there are; what a user has set stands."""
    threads = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    try:
        for ranks, expected in (("1", 12), ("4", 3), ("5", 2), ("16", 1)):
            torch.set_num_threads(12)
            monkeypatch.setenv(name, ranks)
            dist.share_cores()
            assert torch.get_num_threads() == expected, ranks
        monkeypatch.setenv("OMP_NUM_THREADS", "7")
        monkeypatch.setenv(name, "4")
        dist.share_cores()
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("name", dist.MPI_SIZES)
def test_processes_of_mpirun_do_not_train_each_by_itself(environ, monkeypatch, name):
    monkeypatch.setenv(name, "1")
    dist._set_environment()
    assert dist.world_size() == 1
    for known in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(known)
    monkeypatch.setenv(name, "2")
    with pytest.raises(ValueError, match="mpirun has started 2 processes.*deepspeed"):
        dist._set_environment()
    # srun's own variables come first: it may speak PMI as well
    environ(SLURM_PROCID="1", SLURM_STEP_NUM_TASKS="2", SLURM_LOCALID="1")
    environ(SLURM_STEP_NODELIST="n1", SLURM_JOB_ID="7")
    dist._set_environment()
    assert (dist.rank(), dist.world_size()) == (1, 2)


@pytest.mark.parametrize("rank, speaks", [("0", False), ("3", False), ("8", True)])
def test_a_network_that_is_not_there(environ, monkeypatch, capsys, rank, speaks):
    """Rank 0's script says what it raises; a second machine's first rank has nobody to say it."""
    environ(RANK=rank, WORLD_SIZE="16", LOCAL_RANK=str(int(rank) % 8))
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    dist.refuse_missing_interfaces()
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo,ib7")
    with pytest.raises(ValueError, match="GLOO_SOCKET_IFNAME names ib7, .* it has .*lo"):
        dist.init()
    assert ("error: GLOO_SOCKET_IFNAME" in capsys.readouterr().err) == speaks


def test_launcher_s_variables_stand(environ):
    environ(RANK="3", WORLD_SIZE="4", LOCAL_RANK="1", SLURM_PROCID="0", SLURM_STEP_NUM_TASKS="2")
    dist._set_environment()
    assert (dist.rank(), dist.world_size(), dist.local_rank(), dist.is_main()) == (3, 4, 1, False)


def test_srun_with_a_task_a_gpu(environ, monkeypatch):
    environ(
        SLURM_PROCID="9",
        SLURM_STEP_NUM_TASKS="16",
        SLURM_LOCALID="1",
        SLURM_STEP_NODELIST="gpu[03-04,7]",
        SLURM_JOB_ID="123456",
    )
    dist._set_environment()
    assert (dist.rank(), dist.world_size(), dist.local_rank()) == (9, 16, 1)
    import os

    assert os.environ["MASTER_ADDR"] == "gpu03" and os.environ["MASTER_PORT"] == "23456"


def test_a_batch_job_s_single_task_is_alone(environ):
    environ(SLURM_PROCID="0", SLURM_STEP_NUM_TASKS="1", SLURM_JOB_ID="7")
    dist._set_environment()
    assert dist.world_size() == 1


@pytest.mark.parametrize(
    "nodes, first",
    [
        ("gpu7", "gpu7"),
        ("gpu7,gpu9", "gpu7"),
        ("gpu[03-05,9],x1", "gpu03"),
        ("gpu[12,14]", "gpu12"),
        ("a-b-[001-002]", "a-b-001"),
    ],
)
def test_first_host(nodes, first):
    assert dist._first_host(nodes) == first


def test_ranks_that_share_a_gpu_are_refused():
    """Five ranks on a node of four GPUs: the fifth took the first GPU again, in silence."""
    gpus = [dist.Gpu("gpu03", f"GPU-{i % 4}") for i in range(5)]
    with pytest.raises(ValueError, match="ranks 0 and 4 share one GPU of gpu03, .* sees 4: start"):
        dist.refuse_shared_gpus(gpus, 4)
    dist.refuse_shared_gpus(gpus[:4], 4)
    # srun --gpus-per-task=1: each task sees one GPU, as its first
    others = [("gpu03", "GPU-0"), ("gpu03", "GPU-1"), ("gpu04", "GPU-0")]
    dist.refuse_shared_gpus([dist.Gpu(*each) for each in others], 1)


@pytest.mark.parametrize("uuids", [("GPU-0", "GPU-0"), ("MIG-a", "MIG-b")])
def test_slices_of_a_gpu_are_no_shared_gpu(monkeypatch, uuids):
    """Whether CUDA says the card's uuid of a slice, or the slice's own."""

    def ranks(*visible):
        """Each with its CUDA_VISIBLE_DEVICES, of which CUDA shows it the first slice."""
        found = []
        for names in visible:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", names)
            uuid = uuids["MIG-b" in names.split(",")[0]]
            monkeypatch.setattr(
                torch.cuda,
                "get_device_properties",
                lambda device, uuid=uuid: SimpleNamespace(uuid=uuid),
            )
            found.append(dist.gpu_of(torch.device("cuda", 0)))
        return found

    monkeypatch.setattr(dist.socket, "gethostname", lambda: "gpu03")
    monkeypatch.delenv("NCCL_MULTI_RANK_GPU_ENABLE", raising=False)
    slices = ranks("MIG-a", "MIG-b")
    dist.refuse_shared_gpus(slices, 1)
    assert "set NCCL_MULTI_RANK_GPU_ENABLE=1" in dist.about_slices(slices)
    monkeypatch.setenv("NCCL_MULTI_RANK_GPU_ENABLE", "1")
    assert dist.about_slices(slices) is None
    # a launcher that gives both to both: each rank takes the first
    with pytest.raises(ValueError, match="ranks 0 and 1 share MIG-a of gpu03, one MIG slice"):
        dist.refuse_shared_gpus(ranks("MIG-a,MIG-b", "MIG-a,MIG-b"), 1)


def test_which_gpu_a_rank_has(monkeypatch):
    """Numbers, uuids and nothing in CUDA_VISIBLE_DEVICES name no slice."""
    properties = SimpleNamespace(uuid="GPU-1")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(dist.socket, "gethostname", lambda: "gpu03")
    for names in ("0,1", "GPU-0,GPU-1", "3"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", names)
        assert dist.gpu_of(torch.device("cuda", 1)) == ("gpu03", "GPU-1", "")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    found = dist.gpu_of(torch.device("cuda", 1))
    assert found == ("gpu03", "GPU-1", "") and dist.about_slices([found, found]) is None


def two_ranks(code: str) -> list[subprocess.Popen]:
    """Two processes that run `code`, as ranks of one job on this machine."""
    with dist.socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    common |= {"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}
    return [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]


WAITER = """
import datetime, time
from train.engine import dist
dist.TIMEOUT = datetime.timedelta(seconds=6)
dist.init()
with dist.main_process_first():
    if dist.is_main():
        time.sleep(12)
dist.barrier()
print(dist.broadcast("told" if dist.is_main() else None), dist.all_gather(dist.rank()))
dist.shutdown()
"""


@pytest.mark.slow
def test_ranks_wait_for_the_first_longer_than_for_a_computation():
    """Tokenising may take longer than any collective of tensors does."""
    ranks = two_ranks(WAITER)
    began = time.monotonic()
    for rank in ranks:
        said, errors = rank.communicate(timeout=300)
        assert rank.returncode == 0, errors[-3000:]
        assert said.splitlines()[-1] == "told [0, 1]"
    assert time.monotonic() - began > 12


IN_MAIN_MEMORY = """
import torch
from train.engine import dist
# as NCCL does, this group takes tensors on GPUs alone
torch.distributed.init_process_group("cuda:gloo")
dist.init()
summed = dist.all_reduce(torch.tensor([1.0, dist.rank()], dtype=torch.float64))
told = dist.broadcast_tensor(torch.tensor([7.0 + dist.rank()]))
print(summed.tolist(), told.tolist())
dist.shutdown()
"""


@pytest.mark.slow
def test_tensors_in_main_memory_where_the_ranks_compute_on_gpus():
    """A rollout's measures are added up there."""
    for rank in two_ranks(IN_MAIN_MEMORY):
        said, errors = rank.communicate(timeout=300)
        assert rank.returncode == 0, errors[-3000:]
        assert said.splitlines()[-1] == "[2.0, 1.0] [7.0]"
