"""Who a process is under each launcher."""

import pytest

from train.engine import dist

NAMES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
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
