"""Runs the user's commands, each test with a cache of its own."""

import importlib.util
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def free_port():
    """Two jobs on one machine must not meet."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launched(command, cache):
    """Run a command to its end; the completed process with its text. tests/conftest.py sees to PATH
    and no network.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ZEROPREF_CACHE": str(cache)}
    return subprocess.run(
        list(map(str, command)),
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
    )


def settings_of(script):
    """The Settings of a script, whose module stays: the parser looks its annotations up there."""
    name = f"script_{Path(script).stem}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / script)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name].Settings


def several(script, lines, cache):
    """(exit code, stdout, stderr) of a script for each list of arguments, from one process."""
    arguments = json.dumps([list(map(str, line)) for line in lines])
    done = launched([sys.executable, "tests/launch/many.py", ROOT / script, arguments], cache)
    outs, errs = (text.split("=== ") for text in (done.stdout, done.stderr))
    assert len(outs) == len(errs) == len(lines) + 1, done.stderr[-3000:]

    def cut(parts, i):
        return parts[i].partition("\n")[2] if i else parts[i]

    return [(outs[i + 1].partition("\n")[0], cut(outs, i), cut(errs, i)) for i in range(len(lines))]
