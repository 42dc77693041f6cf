"""Run by test_pretend.py: cases on pretend CUDA, one line of JSON each.

    python tests/cuda_pretend/run_cases.py FOLDER [CASE ...]

FOLDER: where the guard is compiled to.
"""

import json
import os
import sys
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from tests.cuda_pretend import pretend


def in_short(raised) -> str:
    """An exception, and the project's lines that led to it."""
    frames = traceback.extract_tb(raised.__traceback__)
    ours = [frame for frame in frames if Path(frame.filename).is_relative_to(ROOT)]
    lines = [f"{frame.filename}:{frame.lineno} {frame.line}" for frame in ours]
    return "\n".join([*lines, f"{type(raised).__name__}: {raised}"])


def main():
    folder, *names = sys.argv[1:]
    os.environ |= {"DS_ACCELERATOR": "cuda", "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}  # nobody meets there
    fake = pretend.start(Path(folder))
    import torch.distributed as td
    from torch.testing._internal.distributed.fake_pg import FakeStore

    td.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    import deepspeed

    from train import quiet

    quiet.silence_libraries()
    deepspeed.init_distributed(dist_backend="fake", auto_mpi_discovery=False, verbose=False)

    from tests.cuda_pretend import cases

    watch = pretend.make_watch(cases.MAY_WAIT)
    for name in names or cases.CASES:
        watch.forget(everything=True)
        began, error, facts = time.perf_counter(), None, {}
        try:
            facts = cases.CASES[name](cases.Pretend(watch, fake, Path(folder)))
        except Exception as raised:
            error = in_short(raised)
        found = {
            "case": name,
            "error": error,
            "waits": sorted(set(watch.waits)),
            "allowed": sorted(set(watch.allowed)),
            "facts": facts,
            "seconds": round(time.perf_counter() - began, 2),
        }
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    try:
        main()
        code = 0
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # autograd's thread of the device cannot be joined
