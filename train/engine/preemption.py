"""Being told to stop, and noticing that the others are gone.

A script calls `install_handlers` before it imports torch: SIGTERM and SIGUSR1 then only leave a
note. Ranks agree on it before every batch (`raise_if_preempted`), and all of them leave the loop at
the same place by `Preempted`. A thread ends a rank whose peers have fallen silent: a hung collective
would hold its GPU until the job's time limit.

Imports torch inside functions only: the handlers stand before the seconds that torch takes.
"""

import atexit
import contextlib
import logging
import os
import signal
import sys
import threading

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
BEAT = 5.0  # seconds between signs of life
SILENT = 120.0  # seconds without one after which a rank counts as gone
_signals_received = []
_finished = []  # holds something once this rank has ended in order
_group = None  # the side group over which the ranks agree
_stop_watching = None  # an Event
_thread = None


class Preempted(Exception):
    """All ranks raise it before the same batch."""


def install_handlers():
    """Note the signals from here on instead of obeying them."""
    for number in SIGNALS:
        signal.signal(number, lambda received, _: _signals_received.append(received))


def obey_signals():
    """Obey the signals again, as a process does that has noted nothing."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)


def start_watch():
    """Begin to agree and to watch, once the process group stands. Every rank calls this."""
    global _group, _stop_watching, _thread
    from train.engine import dist

    if dist.world_size() > 1:
        import torch.distributed as td

        _group = td.new_group(backend="gloo", timeout=dist.TIMEOUT)
        _stop_watching = threading.Event()
        _thread = threading.Thread(
            target=_watch_peers, args=(dist.Heartbeats(), _stop_watching), daemon=True
        )
        _thread.start()
        atexit.register(_join)


def stop_watch():
    """Say that this rank is done, so that its silence means nothing from now on.

    Not for a rank that ends by an error.
    """
    _finished.append(True)
    _join()


def _join():
    if _stop_watching:
        _stop_watching.set()
        _thread.join(BEAT)  # an interpreter that ends under a thread in the store's C++ aborts


def told_to_stop() -> bool:
    """Whether this rank has been told to stop; the others may not know yet."""
    return bool(_signals_received)


def raise_if_preempted():
    """Raise Preempted on every rank where any has been told to stop.

    Every rank calls this before each batch.
    """
    if any_rank(bool(_signals_received)):
        raise Preempted


def any_rank(flag: bool) -> bool:
    """Whether `flag` is true on any rank. Every rank calls this."""
    if _group is None:
        return flag
    import torch
    import torch.distributed as td

    flags = torch.tensor([flag], dtype=torch.int32)
    td.all_reduce(flags, td.ReduceOp.MAX, group=_group)
    return bool(flags)


def _watch_peers(peers, stop):
    """The thread: say that this rank lives, and end it where another has not for SILENT seconds."""
    last_beats = {}  # rank -> (its last sign of life, for how many rounds it has been the same)
    number = 0
    while not stop.wait(BEAT):
        # silence is counted in rounds of this thread: a machine that sleeps has none
        number += 1
        try:
            beats = peers.exchange(number)
        except Exception as error:  # the store lives in rank 0
            _end_this_rank(f"rank 0 is gone ({type(error).__name__})", stop)
            return
        for rank, beat in beats.items():
            last, rounds = last_beats.get(rank, (None, 0))
            last_beats[rank] = (beat, rounds + 1 if beat == last else 0)
            if beat != "done" and last_beats[rank][1] * BEAT > SILENT:
                _end_this_rank(f"rank {rank} has been silent for {SILENT:.0f} s", stop)
                return
    with contextlib.suppress(Exception):  # rank 0 may have gone, and its store with it
        if _finished:
            peers.exchange("done")


def _end_this_rank(reason, stop):
    if stop.wait(BEAT):  # the others may just have ended well, a moment before this rank
        return
    logging.getLogger("zeropref").error("%s: this rank ends", reason)
    print(f"error: {reason}: this rank ends", file=sys.stderr, flush=True)
    os._exit(1)  # the main thread may hang in a collective that no exception reaches
