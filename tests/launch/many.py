"""Runs a launch script for several command lines in one process, to pay for its imports once.

    python tests/launch/many.py launch/train_dpo.py '[["--beta", "x"], ...]'

Each line ends with its exit code on stdout, after the marker.
"""

import json
import runpy
import sys
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from train.engine import dist

dist.shutdown = lambda: None  # DeepSpeed cannot join a second process group in one process
script, lines = sys.argv[1], json.loads(sys.argv[2])
for arguments in lines:
    sys.argv = [script, *arguments]
    try:
        runpy.run_path(script, run_name="__main__")
        code = 0
    except SystemExit as error:
        code = error.code or 0
    except BaseException:
        traceback.print_exc()
        code = "traceback"
    for stream in (sys.stdout, sys.stderr):
        print(f"=== {code}", file=stream, flush=True)
