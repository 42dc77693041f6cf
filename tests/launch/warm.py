"""Starts ranks of launch/train_dpo.py without paying for their imports each time: a process that
has them forks.

    with Warm() as warm:
        job = warm.start(["--output", "out", ...], ranks=2)
        os.kill(job.pids[0], signal.SIGKILL)
        codes, text = job.wait()

A rank is a real process with a process group of its own kind (gloo, its own port), as a launcher
would start it; exit codes are the ranks' own. What launchers add is tested in test_train_dpo.py and
test_slurm.py.
"""

import contextlib
import functools
import importlib
import json
import os
import resource
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


class Warm:
    """The forking process. Use as a context; `cache`: where tokenised data goes."""

    def __init__(self, cache, script="launch/train_dpo.py"):
        env = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "ZEROPREF_CACHE": str(cache),
            "HF_HUB_OFFLINE": "1",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }
        self.cache, self.job = cache, None
        self.process = subprocess.Popen(
            [sys.executable, __file__, str(ROOT / script)],
            cwd=ROOT,
            env=env,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.stdin.close()
        self.process.wait(60)

    def start(self, arguments, ranks=1, patch=None, file_bytes=None, signal_after=None):
        """Fork the ranks. patch: {"module.NAME": value}, constants to set; file_bytes: no file may
        grow beyond; signal_after: (a signal, calls) as `send_after` takes them, on every rank.
        """
        if self.job and not self.job.done:  # a test failed and left it
            self.job.kill()
            self.job.wait()
        log = tempfile.NamedTemporaryFile("r", suffix=".log")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        job = {
            "arguments": list(map(str, arguments)),
            "ranks": ranks,
            "port": port,
            "log": log.name,
            "patch": patch or {},
            "file_bytes": file_bytes,
            "signal_after": signal_after,
        }
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        self.job = Job(self, json.loads(self.process.stdout.readline()), log)
        return self.job

    def run(self, arguments, ranks=1, **options):
        """Exit codes of the ranks, and all they printed."""
        return self.start(arguments, ranks, **options).wait()


class Job:
    """Running ranks."""

    def __init__(self, warm, pids, log):
        self.warm, self.pids, self.log, self.done = warm, pids, log, False

    def kill(self, number=signal.SIGKILL):
        """Send every rank a signal."""
        for pid in self.pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def wait(self, seconds=240):
        """Exit codes in order of rank (negative: the signal that ended it), and the text."""
        alarm = threading.Timer(seconds, self.kill)
        alarm.start()
        codes = json.loads(self.warm.process.stdout.readline())
        alarm.cancel()
        self.done = True
        text = self.log.read()
        self.log.close()
        return codes, text


def serve(script):
    """Read jobs from stdin, fork, say who was born, wait, say how each ended."""
    answers = os.fdopen(os.dup(1), "w")  # what libraries print goes elsewhere
    os.dup2(2, 1)
    sys.path.insert(0, str(ROOT))
    import datasets  # noqa: F401
    import deepspeed  # noqa: F401

    # all that a launch script imports, which constants are set in before it runs
    import sklearn.linear_model  # noqa: F401
    import torch.utils.tensorboard  # noqa: F401

    from train.methods import preference_report, reward, reward_report, setup  # noqa: F401
    from train.run import loop, session  # noqa: F401

    for line in sys.stdin:
        job = json.loads(line)
        pids = [os.fork() or rank(script, job, number) for number in range(job["ranks"])]
        print(json.dumps(pids), file=answers, flush=True)
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        print(json.dumps(codes), file=answers, flush=True)


def rank(script, job, number):
    """The life of one rank; does not return."""
    code = 1
    try:
        os.environ |= {
            "RANK": str(number),
            "LOCAL_RANK": str(number),
            "WORLD_SIZE": str(job["ranks"]),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(job["port"]),
        }
        log = os.open(job["log"], os.O_WRONLY | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(log, stream)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for name, value in job["patch"].items():
            module, _, constant = name.rpartition(".")
            setattr(sys.modules[module], constant, value)
        if job["file_bytes"]:
            resource.setrlimit(resource.RLIMIT_FSIZE, (job["file_bytes"],) * 2)
        if job["signal_after"]:
            send_after(*job["signal_after"])
        sys.argv = [script, *job["arguments"]]
        runpy.run_path(script, run_name="__main__")
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(bool(error.code))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def send_after(number, calls):
    """Send this process a signal after a certain call of a function or method has returned.

    calls: [["module:name", how many], ...]; each entry's calls count from when those of the entry
    before it are done, and the signal follows the last.
    """
    left = [list(call) for call in calls]

    def counted(function, name):
        @functools.wraps(function)
        def call(*args, **kwargs):
            found = function(*args, **kwargs)
            if left and left[0][0] == name:
                left[0][1] -= 1
                if not left[0][1]:
                    del left[0]
                    if not left:
                        os.kill(os.getpid(), number)
            return found

        return call

    for name in {name for name, _ in calls}:
        module, _, path = name.partition(":")
        owner = importlib.import_module(module)
        *classes, last = path.split(".")
        for each in classes:
            owner = getattr(owner, each)
        setattr(owner, last, counted(getattr(owner, last), name))


if __name__ == "__main__":
    serve(sys.argv[1])
