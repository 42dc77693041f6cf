"""launch/slurm/: the wrappers read as shell, a sweep's combinations, and the chain on a SLURM
cluster of its own.
"""

import contextlib
import itertools
import json
import os
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).resolve().parents[2]
SLURM = ROOT / "launch/slurm"
SHELL = sorted(p for p in SLURM.iterdir() if p.suffix in (".sh", ".sbatch"))
PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin"

# Two nodes that are one machine. Limits are in minutes: a job may outlive its own by two, so that
# what is seen is the warning before the limit and not the kill at it.
CONF = """
ClusterName=mini
SlurmctldHost={host}(127.0.0.1)
AuthType=auth/munge
AuthInfo=socket={root}/munge.socket
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
SlurmctldPort={ports[0]}
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/%n.pid
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool-%n
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
OverTimeLimit=2
KillWait=10
GresTypes=gpu
NodeName=one NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 Gres=gpu:3 State=UNKNOWN
NodeName=two NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 Gres=gpu:3 State=UNKNOWN
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE:4
"""

# What the wrapper sees of a script: --print_config, OUTPUT/status, an exit code. Each rank notes
# what it was given.
STAND_IN = """
import json, os, sys, time
flags = dict(word[2:].split("=", 1) for word in sys.argv[1:] if "=" in word)
if sys.argv[-1] == "--print_config":
    print("output:", flags["output"])
    sys.exit(2 if "wrong" in flags else 0)
seen = {k: os.environ.get(k) for k in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")}
with open(flags["output"] + "/seen", "a") as file:
    file.write(json.dumps({**seen, "flags": flags}) + "\\n")
if "status" in flags:
    open(flags["output"] + "/status", "w").write(flags["status"])
time.sleep(float(flags.get("sleep", 0)))
sys.exit(int(flags.get("code", 0)))
"""


@pytest.mark.parametrize("path", SHELL, ids=lambda p: p.name)
def test_wrappers_are_sound_shell(path):
    done = subprocess.run(["bash", "-n", path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert max(map(len, path.read_text().splitlines())) <= 120
    if shutil.which("shellcheck"):
        done = subprocess.run(["shellcheck", "-x", path], capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stdout


def test_nothing_in_the_wrappers_belongs_to_one_site():
    options = [
        line
        for path in SHELL
        for line in path.read_text().splitlines()
        if line.startswith("#SBATCH")
    ]
    known = {"--job-name", "--nodes", "--ntasks-per-node", "--signal", "--requeue", "--open-mode"}
    assert {re.split("[ =]", line)[1] for line in options} == known


def sweep(tmp_path, text, which, *flags):
    """Exit code, stdout and stderr of sweep.py on `text`."""
    (tmp_path / "values.yaml").write_text(text)
    command = [
        sys.executable,
        SLURM / "sweep.py",
        which,
        tmp_path / "values.yaml",
        ROOT / "launch/train_dpo.py",
        *flags,
    ]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def test_a_sweep_is_every_combination_once_and_stays_in_its_folder(tmp_path):
    module = runpy.run_path(str(SLURM / "sweep.py"))
    runs = module["combinations"](
        {"beta": [0.05, "0.1"], "lr": ["1e-6", 5e-6], "loss_args": [{"tau": 2}]}
    )
    betas, rates = ("0.05", "0.1"), ("1e-6", "5e-06")
    assert [(r["beta"], r["lr"]) for r in runs] == list(itertools.product(betas, rates))
    assert module["combinations"]([{"seed": 1}, {"seed": 2, "lr": 0.1}]) == [
        {"seed": "1"},
        {"seed": "2", "lr": "0.1"},
    ]
    assert (
        module["folder_of"]({"model": "../../etc/my model", "k": ".."})
        == "model-..-..-etc-my-model_k-.."
    )

    text = "beta: [0.05, 0.5]\nloss_args: [{tau: 2}]"
    code, out, err = sweep(tmp_path, text, 1, "--output", "runs/a b", "--lr", "1e-3")
    assert (code, err) == (0, "")
    assert out.split("\0") == [
        "--beta=0.5",
        '--loss_args={"tau": 2}',
        "--output=runs/a b/beta-0.5_loss_args--tau-2-",
        "",
    ]
    assert sweep(tmp_path, text, "count")[1] == "2\n"


@pytest.mark.parametrize(
    "text, said",
    [
        ("beta: 0.1", "expected lines of"),
        ("{}", "expected lines of"),
        ("beta: []", "expected lines of"),
        ("output: [a, b]", "'output' is not a flag to sweep"),
        ("'--beta; rm -rf': [1]", "is not a flag to sweep"),
        ("beta: [0.1, '0.1']", "two combinations would write to beta-0.1"),
        ("beta: [0.1, 0.2]", "there are 2 combinations, no number 9"),
        ("beta: [", "values.yaml: while parsing"),
    ],
)
def test_what_is_wrong_with_a_sweep_is_said(tmp_path, text, said):
    code, out, err = sweep(tmp_path, text, 9)
    assert code == 1 and out == "" and said in err and "Traceback" not in err
    words = [SLURM / "sweep.sbatch", tmp_path / "values.yaml", "launch/train_dppo.py"]
    done = subprocess.run(
        words, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PATH": PATH}
    )
    assert done.returncode == 2 and "VALUES.yaml SCRIPT" in done.stderr


def test_a_pipeline_without_a_script_submits_nothing(tmp_path):
    (tmp_path / "sbatch").write_text(f"#!/bin/sh\ntouch {tmp_path}/submitted\n")
    (tmp_path / "sbatch").chmod(0o755)
    done = subprocess.run(
        [SLURM / "pipeline.sh", "--nodes=2", "launch/train_dppo.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": f"{tmp_path}:{PATH}"},
    )
    assert (
        done.returncode == 2
        and "stage 1 has no script" in done.stderr
        and not (tmp_path / "submitted").exists()
    )


class Cluster:
    """munged, slurmctld and two slurmd of this test alone."""

    def __init__(self, root: Path):
        self.root, self.daemons = root, []
        with_ports = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
        ports = [s.getsockname()[1] for s in with_ports]
        for s in with_ports:
            s.close()
        for name in ("state", "spool-one", "spool-two"):
            (root / name).mkdir()
        for number in range(3):  # SLURM numbers what it hands out by their names
            os.mknod(root / f"gpu{number}", 0o20600, os.makedev(1, 3))
        (root / "gres.conf").write_text(f"Name=gpu Flags=nvidia_gpu_env File={root}/gpu[0-2]\n")
        (root / "slurm.conf").write_text(
            CONF.format(root=root, host=socket.gethostname().split(".")[0], ports=ports)
        )
        self.env = {
            **os.environ,
            "PATH": PATH,
            "SLURM_CONF": str(root / "slurm.conf"),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "ZEROPREF_CACHE": str(root / "cache"),
            "ZEROPREF_MASTER": "127.0.0.1",
        }

    def start(self):
        (self.root / "munge.key").write_bytes(os.urandom(128))
        (self.root / "munge.key").chmod(0o600)
        paths = {
            "key-file": "key",
            "socket": "socket",
            "pid-file": "pid",
            "log-file": "log",
            "seed-file": "seed",
        }
        self._daemon(
            "munged",
            "--foreground",
            "--force",
            *(f"--{k}={self.root}/munge.{v}" for k, v in paths.items()),
        )
        self.until(lambda: (self.root / "munge.socket").exists(), 20)
        self._daemon("slurmctld", "-D")
        for node in ("one", "two"):
            self._daemon("slurmd", "-D", "-N", node)
        self.until(
            lambda: self("sinfo", "-h", "-o", "%T %D", may_fail=True) == "idle 2\n", 60, self.logs
        )

    def logs(self):
        return "".join(
            f"{path.name}\n{path.read_text()[-2000:]}" for path in self.root.glob("*.log")
        )

    def stop(self):
        self("scancel", "--user=root", may_fail=True)
        self.until(lambda: not self("squeue", "-h", may_fail=True), 60)
        for daemon in reversed(self.daemons):
            daemon.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                daemon.wait(20)
            daemon.kill()

    def _daemon(self, name, *options):
        with open(self.root / f"{name}{len(self.daemons)}.log", "w") as log:
            self.daemons.append(
                subprocess.Popen(
                    [name, *options], env=self.env, stdout=log, stderr=log, stdin=subprocess.DEVNULL
                )
            )

    def __call__(self, *command, may_fail=False, **env):
        """stdout of a command of SLURM or of ours, run in the clone's root."""
        done = subprocess.run(
            list(map(str, command)), env=self.env | env, cwd=ROOT, capture_output=True, text=True
        )
        assert may_fail or done.returncode == 0, f"{command}: {done.stdout} {done.stderr}"
        return done.stdout

    def job(self, number) -> dict:
        shown = self("scontrol", "show", "job", "-o", number)
        return dict(word.split("=", 1) for word in shown.split() if "=" in word)

    def until(self, condition, seconds, tell=lambda: ""):
        end = time.monotonic() + seconds
        while not condition():
            for daemon in self.daemons:
                assert daemon.poll() is None, f"{daemon.args[0]} ended\n{tell()}"
            assert time.monotonic() < end, f"waited {seconds} s\n{tell()}"
            time.sleep(0.2)

    def until_job(self, number, state, restarts, seconds):
        """Wait for a state and a number of restarts; what has been requeued does not wait out
        SLURM's two minutes.
        """
        hastened = set()

        def there():
            job = self.job(number)
            if int(job["Restarts"]) == restarts and job["JobState"] == state:
                return True
            if (
                job["JobState"] == "PENDING"
                and job["Reason"] == "BeginTime"
                and job["Restarts"] not in hastened
            ):
                # not at once: SLURM takes a start in the second of the requeue for the one that it
                # has just ended
                update = ["scontrol", "update", f"job={number}", "StartTime=now+3"]
                if subprocess.run(update, env=self.env, capture_output=True).returncode == 0:
                    hastened.add(job["Restarts"])
            ended = job["JobState"] in ("FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "COMPLETED")
            assert not ended, f"{job['JobState']} {job['ExitCode']}\n{self.log(number)}"
            return False

        self.until(there, seconds, lambda: self.log(number))

    def log(self, number) -> str:
        path = Path(self.job(number)["StdOut"])
        return path.read_text() if path.exists() else f"{path} is not there"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    missing = [
        name
        for name in ("munged", "slurmctld", "slurmd", "sbatch")
        if not shutil.which(name, path=PATH)
    ]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)} (Debian: slurm-wlm, munge)")
    if os.getuid() != 0:
        pytest.skip("a SLURM cluster of its own needs root")
    cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture
def stand_in(tmp_path):
    (tmp_path / "script.py").write_text(STAND_IN)
    return tmp_path / "script.py"


def submit(cluster, folder, *words, **env):
    """Submit train.sbatch; the job's number."""
    return int(cluster("sbatch", "--parsable", f"--output={folder}/%j.log", *words, **env))


def seen(folder):
    return [json.loads(line) for line in (folder / "seen").read_text().splitlines()]


def folders(tmp_path, *names):
    for name in names:
        (tmp_path / name).mkdir()
    return [tmp_path / name for name in names]


@pytest.mark.slow
def test_ranks_codes_and_restarts(cluster, stand_in, tmp_path):
    """What the wrapper makes of allocations and exit codes; the jobs run side by side."""
    gpus, capped, stale, wrong, cancelled = folders(
        tmp_path, "gpus", "capped", "stale", "wrong", "cancelled"
    )
    wrapper, out = SLURM / "train.sbatch", lambda folder: f"--output={folder}"
    (stale / "status").write_text("preempted\n")
    submit(
        cluster, tmp_path, "--gpus-per-node=1", "--nodes=2", "--wrap=sleep 300"
    )  # holds the first GPU of each node
    jobs = {
        gpus: submit(
            cluster,
            tmp_path,
            "--gpus-per-node=2",
            "--nodes=2",
            wrapper,
            stand_in,
            out(gpus),
            "--x=a 'b' $c",
        ),
        capped: submit(
            cluster,
            tmp_path,
            wrapper,
            stand_in,
            out(capped),
            "--code=7",
            "--status=preempted",
            ZEROPREF_RESTARTS="1",
        ),
        stale: submit(cluster, tmp_path, wrapper, stand_in, out(stale), "--code=1"),
        wrong: submit(cluster, tmp_path, wrapper, stand_in, out(wrong), "--wrong=1"),
        cancelled: submit(
            cluster,
            tmp_path,
            wrapper,
            stand_in,
            out(cancelled),
            "--status=preempted",
            "--sleep=300",
        ),
    }
    cluster.until(lambda: (cancelled / "seen").exists(), 120, lambda: cluster.log(jobs[cancelled]))
    cluster("scancel", jobs[cancelled])  # a person's cancel stands, whatever the status file says

    cluster.until_job(jobs[gpus], "COMPLETED", 0, 120)
    ranks = sorted(seen(gpus), key=lambda rank: rank["RANK"])
    assert [(r["RANK"], r["LOCAL_RANK"], r["WORLD_SIZE"]) for r in ranks] == [
        ("0", "0", "4"),
        ("1", "1", "4"),
        ("2", "0", "4"),
        ("3", "1", "4"),
    ]
    assert all(r["CUDA_VISIBLE_DEVICES"] == "1,2" and r["flags"]["x"] == "a 'b' $c" for r in ranks)

    cluster.until_job(jobs[capped], "FAILED", 1, 120)
    assert cluster.job(jobs[capped])["ExitCode"] == "85:0" and len(seen(capped)) == 2
    assert seen(capped)[0]["CUDA_VISIBLE_DEVICES"] == "-1" and "no GPU allocated" in cluster.log(
        jobs[capped]
    )
    log = cluster.log(jobs[capped])
    assert re.findall(r": start (\d+)", log) == ["1", "2"]
    assert "preempted (exit 7): requeued, restart 1 of at most 1" in log
    assert "preempted (exit 7), not requeued after 1 restarts" in log

    cluster.until_job(jobs[stale], "FAILED", 0, 60)
    assert cluster.job(jobs[stale])["ExitCode"] == "1:0" and len(seen(stale)) == 1
    cluster.until_job(jobs[wrong], "FAILED", 0, 60)
    assert cluster.job(jobs[wrong])["ExitCode"] == "2:0" and not (wrong / "seen").exists()
    cluster.until_job(jobs[cancelled], "CANCELLED", 0, 60)
    time.sleep(3)
    assert cluster.job(jobs[cancelled])["JobState"] == "CANCELLED"


@pytest.mark.slow
@pytest.mark.parametrize("exported", ("NONE", "ZEROPREF_RANKS=2"))
def test_a_job_that_takes_little_of_the_submitters_environment(
    cluster, stand_in, tmp_path, exported
):
    """What the wrapper has worked out reaches the ranks all the same; site.sh says the rest."""
    out = tmp_path / "out"
    out.mkdir()
    kept = ("PATH", "SLURM_CONF", "OMP_NUM_THREADS", "ZEROPREF_MASTER")
    site = SLURM / "site.sh"
    assert not site.exists(), "this test makes one"
    try:
        site.write_text("".join(f"export {name}='{cluster.env[name]}'\n" for name in kept))
        job = submit(
            cluster,
            tmp_path,
            f"--export={exported}",
            SLURM / "train.sbatch",
            stand_in,
            f"--output={out}",
        )
        cluster.until_job(job, "COMPLETED", 0, 120)
    finally:
        site.unlink()
    ranks = 2 if exported.endswith("2") else 1
    assert sorted((r["RANK"], r["WORLD_SIZE"]) for r in seen(out)) == [
        (str(rank), str(ranks)) for rank in range(ranks)
    ]
    assert {r["CUDA_VISIBLE_DEVICES"] for r in seen(out)} == {",".join(["-1"] * ranks)}


@pytest.mark.slow
def test_a_chain_whose_link_fails_ends(cluster, stand_in, tmp_path):
    first, second, third = folders(tmp_path, "first", "second", "third")
    told = cluster(
        SLURM / "pipeline.sh",
        f"--output={tmp_path}/%j.log",
        stand_in,
        f"--output={first}",
        "--code=4",
        "then",
        stand_in,
        f"--output={second}",
        "then",
        stand_in,
        f"--output={third}",
    )
    numbers = re.findall(r"^job (\d+): ", told, re.MULTILINE)
    assert len(numbers) == 3
    cluster.until_job(numbers[0], "FAILED", 0, 60)
    for number, folder in zip(numbers[1:], (second, third), strict=True):
        cluster.until_job(number, "CANCELLED", 0, 60)
        assert not (folder / "seen").exists()


@pytest.mark.slow
def test_a_sweep_runs_each_combination_in_its_own_folder(cluster, stand_in, tmp_path):
    (tmp_path / "values.yaml").write_text("beta: [0.1, 0.5]\nname: ['a b']")
    for beta in ("0.1", "0.5"):
        (tmp_path / f"beta-{beta}_name-a-b").mkdir()
    told = cluster(
        SLURM / "sweep.sbatch",
        f"--output={tmp_path}/%A-%a.log",
        tmp_path / "values.yaml",
        stand_in,
        f"--output={tmp_path}",
        "--kept=1",
    )
    number = told.split()[-1]
    cluster.until(lambda: not cluster("squeue", "-h", "-j", number, may_fail=True), 120)
    assert sorted(path.name for path in tmp_path.glob("*.log")) == [
        f"{number}-0.log",
        f"{number}-1.log",
    ]
    for beta in ("0.1", "0.5"):
        folder = tmp_path / f"beta-{beta}_name-a-b"
        assert [rank["flags"] for rank in seen(folder)] == [
            {"local_rank": "0", "output": str(folder), "kept": "1", "beta": beta, "name": "a b"}
        ], (tmp_path / f"{number}-0.log").read_text()


def ranks_of(output):
    """The training processes that write to `output`, without their launchers."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if str(output) in words and any(word.startswith("--local_rank") for word in words):
            found.append(process)
    return found


def told(process):
    """Whether USR1 waits for a process that was stopped, or, for SLURM wakes what it signals, has
    woken it.
    """
    try:
        status = Path(f"/proc/{process.pid}/status").read_text()
    except OSError:
        return True
    pending = int(re.search(r"ShdPnd:\s*(\w+)", status)[1], 16) >> (signal.SIGUSR1 - 1) & 1
    return pending or not re.search(r"State:\s*T", status)


@pytest.mark.slow
def test_a_time_limit_and_a_term_lose_no_step(cluster, model_dir, tmp_path):
    """Two nodes: USR1 ahead of the limit, saved, requeued; TERM, saved, requeued; finished; then
    the evaluation.
    """
    out, steps = tmp_path / "run", 40
    submitted = cluster(
        SLURM / "pipeline.sh",
        f"--output={tmp_path}/%j.log",
        "--nodes=2",
        "--time=60",
        "--signal=USR1@5",
        "launch/train_dpo.py",
        "--model",
        model_dir,
        "--output",
        out,
        "--max_length",
        512,
        "--batch_size",
        16,
        "--lr",
        "1e-3",
        "--epochs",
        9,
        "--max_steps",
        steps,
        "--micro_tokens",
        512,
        "--ds_config",
        "ds_configs/zero1.json",
        "then",
        f"--output={tmp_path}/%j.log",
        "eval/evaluate.py",
        "--model",
        out / "model",
        "--reference",
        model_dir,
        "--max_rows",
        8,
        "--prompts",
        0,
        "--output",
        out / "eval",
    )
    train, evaluate = re.findall(r"^job (\d+): ", submitted, re.MULTILINE)

    def logged():
        return [
            int(n) for n in re.findall(r"INFO step (\d+) ", (out / "logs/rank-0.log").read_text())
        ]

    def tell():
        return cluster.log(train)

    def reached(step):
        assert cluster.job(train)["JobState"] in (
            "PENDING",
            "RUNNING",
            "CONFIGURING",
            "COMPLETING",
        ), tell()
        return (out / "logs/rank-0.log").exists() and logged()[-1:] >= [step]

    # SLURM counts limits in minutes and looks at them twice a minute: the limit comes near when
    # some steps are done, and until the signal is there the ranks are stopped, or a fast machine
    # would be finished by then.
    cluster.until(lambda: reached(4), 300, tell)
    ranks = ranks_of(out)
    assert len(ranks) == 2
    for rank in ranks:
        rank.send_signal(signal.SIGSTOP)
    minutes = int(cluster("squeue", "-h", "-O", "TimeUsed", "-j", train).split(":")[0]) + 1
    cluster("scontrol", "update", f"job={train}", f"TimeLimit={minutes}")
    cluster.until(lambda: all(map(told, ranks)), 120, tell)
    for rank in filter(psutil.Process.is_running, ranks):
        rank.send_signal(signal.SIGCONT)
    cluster.until_job(train, "RUNNING", 1, 120)
    cluster("scontrol", "update", f"job={train}", "TimeLimit=60")
    # of two launchers that end with 85, the step's code may be that of the slower one, which SLURM
    # then terminates
    assert "exits with return code = 85" in tell() and re.search(
        r"preempted \(exit (85|143)\): requeued", tell()
    )
    before = logged()[-1]
    assert before < steps - 10

    cluster.until(lambda: reached(before + 3), 300, tell)
    cluster("scancel", "--signal=TERM", train)
    cluster.until_job(train, "RUNNING", 2, 120)
    assert logged()[-1] < steps and cluster.job(evaluate)["JobState"] == "PENDING"
    cluster.until_job(train, "COMPLETED", 2, 400)
    assert "finished" in (out / "status").read_text()
    assert (
        re.findall(r": start (\d+)", tell()) == ["1", "2", "3"]
        and tell().count(": requeued, restart") == 2
    )
    assert logged() == list(range(1, steps + 1))
    events = EventAccumulator(str(out / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, steps + 1))
    assert json.loads((out / "run.json").read_text())["hardware"]["world"] == 2

    cluster.until_job(evaluate, "COMPLETED", 0, 300)
    assert json.loads((out / "eval/report.json").read_text())["preferences"]


@pytest.mark.slow
def test_a_reward_model_then_ppo_then_evaluation(cluster, model_dir, tmp_path):
    """README's chain: each link takes what the one before has written."""
    reward, ppo = tmp_path / "reward", tmp_path / "ppo"
    lengths = ["--max_length", 200, "--max_prompt_length", 100]
    submitted = cluster(
        SLURM / "pipeline.sh",
        f"--output={tmp_path}/%j.log",
        "launch/train_reward.py",
        *["--model", model_dir, "--output", reward, "--max_steps", 2, "--batch_size", 8, *lengths],
        "then",
        f"--output={tmp_path}/%j.log",
        "launch/train_ppo.py",
        *["--model", model_dir, "--output", ppo, "--max_steps", 2, "--batch_size", 4, *lengths],
        *["--algorithm", "ppo", "--reward_model", reward / "model", "--max_new_tokens", 8],
        "then",
        f"--output={tmp_path}/%j.log",
        "eval/evaluate.py",
        *["--reward_model", reward / "model", "--max_rows", 8, "--output", reward / "eval"],
    )
    jobs = re.findall(r"^job (\d+): ", submitted, re.MULTILINE)
    assert len(jobs) == 3 and cluster.job(jobs[-1])["JobState"] == "PENDING"
    for job in jobs:
        cluster.until_job(job, "COMPLETED", 0, 300)
    record = json.loads((ppo / "run.json").read_text())
    assert record["rewards"] == ["reward_model"] and set(record["evaluations"]) == {"0", "2"}
    assert (ppo / "value_model/config.json").exists()
    chapter = json.loads((reward / "eval/report.json").read_text())["rewards"]
    assert chapter["preferences"]["rows"] == 8 and chapter["trained"]["steps"] == 2
