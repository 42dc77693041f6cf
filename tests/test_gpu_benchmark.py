"""tests/benchmarks/gpu.py, with small sizes on a CPU: that it runs, and says what it should."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "tests/benchmarks/gpu.py"
sys.path.insert(0, str(ROOT))

from tests.benchmarks import gpu
from tests.launch.compare import until


def run(*arguments):
    """The exit status, the table's rows by part, and what was measured."""
    command = [sys.executable, SCRIPT, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    lines = done.stdout.splitlines()
    rows = [tuple(cell.strip() for cell in line.split("|")[1:4]) for line in lines if "|" in line]
    found = json.loads(lines[-1]) if lines else done.stderr
    return done.returncode, rows[2:], found


def test_busy_time_counts_overlaps_once():
    assert gpu.union([(0, 2), (1, 4), (3, 3.5), (6, 7)]) == 5


def test_a_step_is_about_the_reference_workload_s():
    """The packed tokens of 16 pairs, in the mean."""
    tokens = [sum(g.tokens for g in gpu.pairs(gpu.FULL, 16, seed=s)) for s in range(40)]
    assert sum(tokens) / len(tokens) == pytest.approx(gpu.TOKENS_OF_STEP, rel=0.03)


@pytest.mark.slow
def test_a_part_s_limit_ends_what_it_has_started(tmp_path):
    """As the launch script of a part, which would hold the GPU on."""
    pid = tmp_path / "pid"
    program = (
        "import pathlib, subprocess, time\n"
        f"started = subprocess.Popen(['sleep', '60']).pid\npathlib.Path({str(pid)!r}).write_text(str(started))\n"
        "time.sleep(60)"
    )
    with pytest.raises(subprocess.TimeoutExpired):
        gpu.run_within(3.0, [sys.executable, "-c", program])
    status = Path(f"/proc/{pid.read_text()}/status")

    def is_gone():  # or dead, and not yet buried by whoever inherits it
        return not status.exists() or "State:\tZ" in status.read_text()

    until(is_gone, "end of what it had started", seconds=5)
    assert gpu.run_within(9, [sys.executable, "-c", "raise SystemExit('no')"]) == (1, "no\n")


@pytest.mark.slow
def test_it_says_what_is_missing_without_a_gpu(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    code, _, said = run()
    assert code == 2 and "there is no GPU: --tiny runs the same code" in said


@pytest.mark.slow
def test_parts_that_no_time_is_left_for_are_said():
    code, rows, found = run("--tiny", "--minutes", 0, "--parts", "packed", "ppo")
    assert code == 1
    assert rows == [(part, "failed", "no time was left") for part in ("packed", "ppo")]


@pytest.mark.matrix
def test_every_part_runs_on_a_cpu(tmp_path):
    parts = [name for name in gpu.PARTS if name != "trl"]
    code, rows, found = run("--tiny", "--minutes", 14, "--parts", *parts, "--json", tmp_path / "j")
    assert code == 0, rows
    assert {row[0] for row in rows} == set(parts)
    assert found == json.loads((tmp_path / "j").read_text())
    results = found["results"]
    assert results["zero"]["apart"] < 1e-4 and results["resume"]["same"] == results["resume"]["of"]
    assert results["repeat"]["default"] == 5  # a CPU's kernels add up in a fixed order
    loop = results["breakdown"]
    assert set(loop["parts"]) == {"input", "reference", "forward", "backward", "optimiser"}
    assert loop["tokens_per_second"] == pytest.approx(loop["tokens"] / loop["middle"])
    for mode in ("eager", "compiled", "deterministic"):
        of_step = results[mode]
        assert of_step["epoch"] == pytest.approx(of_step["seconds"] * 10_884 / 16)
    assert all(rate > 0 for name, rate in results["generate"].items() if name != "took")
    assert results["ppo"]["perf/seconds_train"] > 0


@pytest.mark.slow
def test_what_is_wrong_is_said_and_fails(monkeypatch, tmp_path, capsys):
    """Not on the command line: a model whose packed rows are off."""
    from train.engine import checks

    monkeypatch.setitem(checks.TOLERANCE, "fp32", -1.0)
    gpu.in_process("packed", gpu.TINY, tmp_path)
    found = json.loads((tmp_path / "packed.json").read_text())
    assert found["wrong"].startswith("packed rows are ")
