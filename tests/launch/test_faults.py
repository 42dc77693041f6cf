"""What a run does when something breaks under it: what is kept, what is said, how it ends."""

import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

from tests.launch.compare import (
    ROOT,
    STEPS,
    at_checkpoint,
    flags,
    same_bits,
    same_run,
    says,
    straight,
    weights,
)


def test_gradients_that_are_not_finite_end_the_run(warm, model_dir, few, tmp_path):
    """A learning rate that breaks the model: exit code 5, the rows, and the state of before."""
    out = tmp_path / "out"
    line = flags(
        model_dir,
        few,
        out,
        0,
        "--lr",
        "1e30",
        "--warmup_ratio",
        0,
        "--max_skipped",
        1,
        "--save_every",
        0,
    )
    codes, text = warm.run(line, 2)
    assert codes == [5, 5], text[-3000:]
    assert "the gradient is not finite; skipped (1 in a row)" in text and "(2 in a row)" in text
    assert "error: 2 steps in a row" in text and "rows [" in text and "Traceback" not in text
    assert (out / "status").read_text() == "failed\n"
    kept = [path.name for path in (out / "checkpoints").glob("step-*")]
    assert kept == ["step-1"] and kept[0] in text
    rows = json.loads(text.rpartition("rows ")[2].partition("]")[0] + "]")
    assert len(rows) == 8 and all(0 <= row < 44 for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize("stage, ranks", [(0, 1), (3, 2)])
@pytest.mark.parametrize(
    "rate, decay, words",
    [
        ("1e30", "1e30", "weights are not finite (model."),
        ("1e15", "0", "the model's log-probabilities are not finite after training"),
    ],
)
def test_a_model_that_has_overflowed_is_not_written(
    warm, model_dir, few, tmp_path, stage, ranks, rate, decay, words
):
    """By the last step, after which no gradient says so."""
    out = tmp_path / "out"
    given = ("--lr", rate, "--weight_decay", decay, "--warmup_ratio", 0, "--max_steps", 1)
    codes, text = warm.run(flags(model_dir, few, out, stage, *given), ranks)
    assert codes == [5] * ranks, text[-3000:]
    assert "Traceback" not in text and text.count("error: ") == 1, text[-3000:]
    line = text[text.index("error: ") :].splitlines()[0]
    assert words in line and line.endswith(
        "no model was written; train again with a smaller --lr or --weight_decay into another --output"
    )
    assert (out / "status").read_text() == "failed\n" and not (out / "model").exists()


def test_a_rank_that_dies_takes_the_others_along(warm, model_dir, few, tmp_path):
    out = tmp_path / "out"
    job = warm.start(flags(model_dir, few, out, 0, "--max_steps", 800, "--epochs", 300), 2)
    at_checkpoint(out, 2)
    os.kill(job.pids[1], signal.SIGKILL)
    began = time.monotonic()
    codes, text = job.wait()
    assert codes[1] == -signal.SIGKILL and codes[0] not in (0, 85), text[-3000:]
    assert time.monotonic() - began < 30
    assert (out / "status").read_text() == "failed\n"
    assert not any((out / "checkpoints").glob("step-1")) or (out / "checkpoints/latest").exists()


def test_two_runs_in_one_folder(warm, model_dir, few, tmp_path):
    """A run locks its folder while it lives; another is refused before it changes anything."""
    out = tmp_path / "out"
    with pytest.raises(BlockingIOError):
        _locked_out(warm, flags(model_dir, few, out, 0, "--max_steps", 800, "--epochs", 300), out)
    assert re.fullmatch(r"process \d+ on .+\n", (out / "logs/lock").read_text())
    line = flags(model_dir, few, tmp_path / "mine")
    (tmp_path / "mine/logs").mkdir(parents=True)
    with open(tmp_path / "mine/logs/lock", "a+") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        lock.write("process 7 on elsewhere")
        lock.flush()
        codes, text = warm.run(line, 2)
    assert codes == [2, 2] and "is being written by another run (process 7 on elsewhere)" in text, (
        text[-2000:]
    )
    assert "Traceback" not in text and not (tmp_path / "mine/run.json").exists()
    assert warm.run(line, 2)[0] == [0, 0]


def _locked_out(warm, line, out):
    job = warm.start(line)
    at_checkpoint(out, 1)
    try:
        assert (out / "logs/lock").read_text().startswith(f"process {job.pids[0]} on ")
        with open(out / "logs/lock", "a+") as lock:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        job.kill()
        job.wait()


def test_a_rank_that_hangs_is_noticed(warm, model_dir, few, tmp_path):
    """A stopped process keeps its connections open: only its silence tells."""
    out = tmp_path / "out"
    patch = {"train.engine.preemption.SILENT": 2.0, "train.engine.preemption.BEAT": 0.2}
    job = warm.start(
        flags(model_dir, few, out, 0, "--max_steps", 800, "--epochs", 300), 2, patch=patch
    )
    at_checkpoint(out, 2)
    os.kill(job.pids[1], signal.SIGSTOP)
    says(job, "has been silent", 60)
    os.kill(job.pids[1], signal.SIGKILL)
    codes, text = job.wait()
    assert (
        codes == [1, -signal.SIGKILL]
        and "error: rank 1 has been silent for 2 s: this rank ends" in text
    )


@pytest.mark.slow
def test_a_machine_that_sleeps_is_not_silent(warm, model_dir, few, tmp_path):
    """Both ranks stopped for longer than a rank may be silent, as a suspended job or machine is:
    they go on.
    """
    patch = {"train.engine.preemption.SILENT": 1.0, "train.engine.preemption.BEAT": 0.2}
    more = ["--max_steps", 40, "--epochs", 20, "--save_every", 0]
    job = warm.start(flags(model_dir, few, tmp_path / "out", 0, *more), 2, patch=patch)
    says(job, r"train: .* [1-9]+/40 \[")
    for _ in range(4):
        job.kill(signal.SIGSTOP)
        time.sleep(1.5)
        job.kill(signal.SIGCONT)
        time.sleep(0.5)
    codes, text = job.wait()
    assert codes == [0, 0], text[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize("opened", (os.pipe, os.openpty))
def test_a_run_outlives_its_terminal(model_dir, few, tmp_path, opened):
    """`| head`, and a connection that breaks: who reads goes after the first words."""
    reader, writer = opened()
    job = subprocess.Popen(
        [sys.executable, "launch/train_dpo.py", *map(str, flags(model_dir, few, tmp_path / "out"))],
        cwd=ROOT,
        env={**os.environ, "ZEROPREF_CACHE": str(tmp_path / "cache")},
        stdout=writer,
        stderr=writer,
        start_new_session=True,
    )
    os.close(writer)
    assert os.read(reader, 1)
    os.close(reader)
    assert job.wait(240) == 0
    assert (tmp_path / "out/status").read_text() == "finished\n"
    assert "deepspeed eval/evaluate.py" in (tmp_path / "out/logs/rank-0.log").read_text()


@pytest.mark.slow
def test_a_disk_that_is_full(warm, model_dir, few, tmp_path):
    """No file may outgrow the limit, which lies between a model and a checkpoint: saves fail,
    training does not.
    """
    out = tmp_path / "out"
    straight(warm, model_dir, few, tmp_path / "straight", 0, 1)
    size = (tmp_path / "straight/model/model.safetensors").stat().st_size
    codes, text = warm.run(flags(model_dir, few, out), file_bytes=2 * size)
    assert codes == [0], text[-3000:]
    assert (
        "no checkpoint after step 1" in text and "File too large" in text and "GB were free" in text
    )
    assert "there is none yet" in text and not any((out / "checkpoints").glob("step-*"))
    for name, value in weights(tmp_path / "straight").items():
        assert value.equal(weights(out)[name])


@pytest.mark.slow
@pytest.mark.parametrize("ranks", (1, 2))
def test_a_model_that_cannot_be_written_costs_no_training(warm, model_dir, few, tmp_path, ranks):
    """The disk has no room for it, nor for a checkpoint; then its place alone is taken."""
    out = tmp_path / "out"
    line = flags(model_dir, few, out, 0, "--save_every", 0)
    codes, text = warm.run(line, ranks, file_bytes=100_000)
    assert codes == [1] * ranks and "Traceback" not in text, text[-2000:]
    (said,) = [words for words in text.splitlines() if words.startswith("error: ")]
    assert f"{out}/model was not written: " in said and "File too large" in said
    assert said.endswith("; once that is mended, the same command goes on")
    assert not (out / "model.tmp").exists() and (out / "status").read_text() == "failed\n"
    (out / "model.tmp").write_text("a file")
    codes, text = warm.run(line, ranks)
    assert codes == [1] * ranks and "Traceback" not in text, text[-2000:]
    assert f"; what was trained is in {out}/checkpoints/step-{STEPS}; once that" in text
    (out / "model.tmp").unlink()
    codes, text = warm.run(line, ranks)
    assert codes == [0] * ranks and f"continues after step {STEPS}" in text, text[-2000:]
    straight(warm, model_dir, few, tmp_path / "straight", 0, ranks, "--save_every", 0)
    same_bits(weights(out), weights(tmp_path / "straight"))


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk")
def test_a_disk_that_fills_up(warm, model_dir, few, tmp_path):
    """A real full disk: the checkpoint of before stays good, the message says what is missing, and
    it continues.
    """
    straight(warm, model_dir, few, tmp_path / "straight", 0, 1)
    one = sum(
        path.stat().st_size
        for path in (tmp_path / "straight/checkpoints/step-8").rglob("*")
        if path.is_file()
    )
    small = tmp_path / "small"
    small.mkdir()
    if os.system(f"mount -t tmpfs -o size={one * 3} tmpfs {small} 2>/dev/null"):
        pytest.skip("this machine mounts nothing")
    try:
        out = small / "out"
        job = warm.start(flags(model_dir, few, out, 0, "--keep", 1))
        at_checkpoint(out, 2)
        job.kill()
        job.wait()
        latest = (out / "checkpoints/latest").read_text().strip()
        for other in (out / "checkpoints").glob(
            "step-*"
        ):  # half a one, or an older one, whose room the next run takes
            if other.name != latest:
                shutil.rmtree(other)
        with open(
            small / "other", "wb"
        ) as file:  # somebody else's data: room for less than one more checkpoint
            free = os.statvfs(small).f_bavail * os.statvfs(small).f_frsize
            file.write(b"0" * (free - one // 2))
        done = warm.start(flags(model_dir, few, out, 0, "--keep", 1))
        says(done, "No space left on device")
        done.kill()
        done.wait()
        os.remove(small / "other")
        codes, text = warm.run(flags(model_dir, few, out, 0, "--keep", 1))
        assert codes == [0] and "continues after step" in text and "damaged" not in text, text[
            -3000:
        ]
        same_run(out, tmp_path / "straight")
    finally:
        os.system(f"umount -l {small}")
