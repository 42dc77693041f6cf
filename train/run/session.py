"""A run from its first line to its exit code."""

import contextlib
import logging

from train.config import Exit, fail
from train.data.errors import DataError
from train.models import builtin

# Before a run has its file, nothing goes to stderr.
logging.getLogger("zeropref").addHandler(logging.NullHandler())


@contextlib.contextmanager
def at_the_door():
    """What is wrong with flags, data or models is said in one line before the first step, with its
    exit code.
    """
    try:
        yield
    except DataError as error:
        fail(str(error), Exit.DATA)
    except (ValueError, OSError, builtin.ModelUnavailable) as error:
        logging.getLogger("zeropref").exception("refused")
        fail(str(error), Exit.FLAGS)
