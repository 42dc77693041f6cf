"""The model hub: whether it answers, which is asked once a process, before a name is looked up there.

    hub.settle()        # where it does not answer, the hub's clients take what is on this machine
    hub.why_offline()   # "https://huggingface.co does not answer (ConnectError: ...)", or ""

Its own clients try each file five times, and need minutes to say that there is no network.
huggingface_hub and datasets are imported inside the functions: that takes a second.
"""

import functools
import os
import queue
import sys
import threading

SECONDS = 5  # for a sign of life, name resolution included


def settle():
    """Turn the hub's clients offline where the hub does not answer: they then take what is in their
    cache on this machine, and say at once what is not.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or not _silence():
        return
    os.environ["HF_HUB_OFFLINE"] = "1"  # of processes that are started from here
    constants.HF_HUB_OFFLINE = True
    if "datasets" in sys.modules:
        from datasets import config

        config.HF_HUB_OFFLINE = config.HF_DATASETS_OFFLINE = True


def why_offline() -> str:
    """Why a name was looked up on this machine alone; "" where the hub was asked."""
    from huggingface_hub import constants

    if not constants.HF_HUB_OFFLINE:
        return ""
    asked = _silence.cache_info().currsize > 0
    return _silence() if asked else "HF_HUB_OFFLINE is set"


@functools.cache
def _silence() -> str:
    """Why the hub does not answer; "" where it does.

    In a thread, because no timeout of an HTTP client covers name resolution; it is left behind.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    answers = queue.SimpleQueue()

    def ask():
        try:
            get_session().head(constants.ENDPOINT, timeout=SECONDS)
            answers.put("")
        except Exception as error:  # the client has dozens of types, and all mean the same
            first_line = next(iter(str(error).strip().splitlines()), "")
            answers.put(f"{type(error).__name__}: {first_line}")

    threading.Thread(target=ask, daemon=True).start()
    try:
        reason = answers.get(timeout=SECONDS)
    except queue.Empty:
        reason = f"nothing in {SECONDS} s"
    return reason and f"{constants.ENDPOINT} does not answer ({reason})"
