"""Being told to stop, and noticing that the others are gone.

A script calls `install` before it imports torch: SIGTERM and SIGUSR1 then only leave a note. Ranks
agree on it before every row (`check`), and all of them leave the loop at the same place by
`Preempted`. A thread ends a rank whose peers have fallen silent: a hung collective would hold its
GPU until the job's time limit.
"""

import atexit
import contextlib
import logging
import os
import signal
import sys
import threading

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
BEAT, SILENT = (
    5.0,
    120.0,
)  # seconds between signs of life; without one for so long a rank counts as gone
_told, _left, _group, _watch, _thread = [], [], None, None, None


class Preempted(Exception):
    """All ranks raise it before the same row."""


def install_handlers():
    """From here on the signals are noted instead of obeyed."""
    for number in SIGNALS:
        signal.signal(number, lambda which, _: _told.append(which))


def start_watch():
    """Begin to agree and to watch, once the process group stands. Every rank calls this."""
    global _group, _watch, _thread
    from train.engine import dist

    if dist.world_size() > 1:
        import torch.distributed as td

        _group = td.new_group(backend="gloo", timeout=dist.TIMEOUT)
        _watch = threading.Event()
        _thread = threading.Thread(
            target=_watch_peers, args=(dist.Heartbeats(), _watch), daemon=True
        )
        _thread.start()
        atexit.register(_join)


def stop_watch():
    """This rank is done, and its silence means nothing from now on. Not for a rank that ends by an
    error.
    """
    _left.append(True)
    _join()


def _join():
    if _watch:
        _watch.set()
        _thread.join(BEAT)  # an interpreter that ends under a thread in the store's C++ aborts


def raise_if_preempted():
    """Raise Preempted on every rank where any has been told to stop. Every rank calls this before
    each row.
    """
    if any_rank(bool(_told)):
        raise Preempted


def any_rank(here: bool) -> bool:
    """Whether it is true on any rank. Every rank calls this."""
    if _group is None:
        return here
    import torch
    import torch.distributed as td

    flag = torch.tensor([here], dtype=torch.int32)
    td.all_reduce(flag, td.ReduceOp.MAX, group=_group)
    return bool(flag)


def _watch_peers(peers, done):
    """The thread: say that this rank lives, and end it where another has not said so for SILENT
    seconds.
    """
    seen, number = (
        {},
        0,
    )  # rank -> its last sign of life, and for how many rounds: a machine that sleeps has none
    while not done.wait(BEAT):
        number += 1
        try:
            beats = peers.exchange(number)
        except Exception as error:  # the store lives in rank 0
            _end_this_rank(f"rank 0 is gone ({type(error).__name__})", done)
            return
        for rank, beat in beats.items():
            last, rounds = seen.get(rank, (None, 0))
            seen[rank] = (beat, rounds + 1 if beat == last else 0)
            if beat != "done" and seen[rank][1] * BEAT > SILENT:
                _end_this_rank(f"rank {rank} has been silent for {SILENT:.0f} s", done)
                return
    with contextlib.suppress(Exception):  # rank 0 may have gone, and its store with it
        if _left:
            peers.exchange("done")


def _end_this_rank(why, done):
    if done.wait(BEAT):  # the others may just have ended well, a moment before this rank
        return
    logging.getLogger("zeropref").error("%s: this rank ends", why)
    print(f"error: {why}: this rank ends", file=sys.stderr, flush=True)
    os._exit(1)  # the main thread may hang in a collective that no exception reaches
