"""Keeps the libraries' start-up chatter off the terminal; ZEROPREF_VERBOSE=1 lets it through. A run
outlives its terminal.
"""

import contextlib
import errno
import io
import logging
import os
import sys
import warnings

LIBRARIES = (
    "DeepSpeed",
    "deepspeed",
    "torch.distributed",
    "torch.utils.cpp_extension",
    "datasets",
    "transformers",
)


def is_verbose() -> bool:
    """Whether the libraries may speak."""
    return os.environ.get("ZEROPREF_VERBOSE", "0") == "1"


@contextlib.contextmanager
def prints_off():
    """Keep what the block prints to stdout off the terminal."""
    with contextlib.ExitStack() as stack:
        if not is_verbose():
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        yield


class _Terminal(io.FileIO):
    """A descriptor whose reader may go: what is written after that is lost."""

    def write(self, block) -> int:
        """Write what can be written; how many bytes need not be written again."""
        try:
            return super().write(block)
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise
            return len(block)


def outlive_terminal():
    """Let stdout and stderr lose what nobody can read any more, where a write would end the run: the
    terminal was closed, or `| head` has seen enough. OUTPUT/logs has it all.
    """
    for name, number in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        try:
            is_ours = stream.fileno() == number
        except (AttributeError, OSError, ValueError):  # closed from the start, or a test's
            continue
        if is_ours:
            stream.flush()
            raw = io.BufferedWriter(_Terminal(number, "w", closefd=False))
            options = {"encoding": stream.encoding, "errors": stream.errors, "write_through": True}
            setattr(sys, name, io.TextIOWrapper(raw, line_buffering=True, **options))


def silence_libraries():
    """Keep the libraries quiet; called before deepspeed is imported."""
    env = os.environ
    env.setdefault("TOKENIZERS_PARALLELISM", "true")
    env.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import torch  # not at the top: it takes seconds, and scripts read their flags before

    if not torch.cuda.is_available():  # else DeepSpeed looks for an accelerator, and says so
        env.setdefault("DS_ACCELERATOR", "cpu")
    if is_verbose():
        return
    env.setdefault("TRANSFORMERS_VERBOSITY", "error")
    env.setdefault("DS_LOG_LEVEL", "error")
    for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
        env.setdefault(name, "1")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module="torch|deepspeed|transformers")
    for name in LIBRARIES:
        logging.getLogger(name).setLevel(logging.ERROR)
    import transformers  # reads the variables above, and takes seconds

    transformers.utils.logging.disable_progress_bar()
