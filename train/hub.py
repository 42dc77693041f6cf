"""The model hub: whether it answers, which is asked once a process, before a name is looked up there;
and uploads.

    hub.settle()        # where it does not answer, the hub's clients take what is on this machine
    hub.why_offline()   # "https://huggingface.co does not answer (ConnectError: ...)", or ""
    hub.check_upload("org/name", public=False)             # at a run's start
    hub.upload(folder, "org/name", public=False)           # at its end

Its own clients try each file five times, and need minutes to say that there is no network.
huggingface_hub and datasets are imported inside the functions: that takes a second.
"""

import functools
import os
import queue
import shlex
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from train.config import named

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
    """Why the hub does not answer; "" where it does."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    def ask():
        get_session().head(constants.ENDPOINT, timeout=SECONDS)

    _, reason = call_within(SECONDS, ask)
    return f"{constants.ENDPOINT} does not answer ({reason})" if reason else ""


def call_within(seconds: float | None, call: Callable) -> tuple[Any, str | None]:
    """(`call()`, None), or (None, why not): its error, or that it took longer than `seconds` (None:
    however long).

    In a thread, because no timeout of an HTTP client covers name resolution; the thread is left
    behind.
    """
    answers = queue.SimpleQueue()

    def run():
        try:
            answers.put((call(), None))
        except Exception as error:  # a client has dozens of types, and all mean: not from there
            answers.put((None, named(error)))

    threading.Thread(target=run, daemon=True).start()
    try:
        return answers.get(timeout=seconds)
    except queue.Empty:
        return None, f"nothing in {seconds} s"


def check_upload(name: str, public: bool) -> str:
    """Why it cannot be seen yet whether `name` takes an upload: the hub does not answer, which it may
    do later; "" where it does. ValueError for what stands against it: the name, the token.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    from huggingface_hub.utils import validate_repo_id

    flag = f"--push_to_hub {name}"
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(f"{flag}: {' '.join(str(error).split())}") from error
    namespace, slash, _ = name.partition("/")
    if not slash:
        raise ValueError(f"{flag}: write ORG/NAME, where ORG may be your own name on the hub")
    if not get_token():
        raise ValueError(
            f"{flag}: there is no token here: `hf auth login`, or set HF_TOKEN to one that may write"
        )
    settle()
    if reason := why_offline():
        if not _silence.cache_info().currsize:
            raise ValueError(f"{flag}: {reason}; unset it, or leave --push_to_hub out")
        return reason
    try:
        me = HfApi().whoami()
        problem = _namespace_problem(namespace, me) or _privacy_problem(name, public)
    except HfHubHTTPError as error:
        if error.response.status_code in (401, 403):
            raise ValueError(
                f"{flag}: the hub does not take the token ({named(error)}); `hf auth login`, or "
                "set HF_TOKEN to one that may write"
            ) from error
        return named(error)
    except Exception as error:  # the client has dozens of types for a network that fails
        return named(error)
    if problem:
        raise ValueError(f"{flag}: {problem}")
    return ""


def _namespace_problem(namespace: str, me: dict) -> str:
    """Why `me`, as the hub describes the token's owner, cannot write there, or ""."""
    mine = [me["name"], *(each["name"] for each in me.get("orgs", ()))]
    if namespace.lower() not in [each.lower() for each in mine]:
        return f"the token is for {' and '.join(mine)}; set HF_TOKEN to one for {namespace}"
    if me.get("auth", {}).get("accessToken", {}).get("role") == "read":
        return "the token may read only; set HF_TOKEN to one that may write"
    return ""


def _privacy_problem(name: str, public: bool) -> str:
    """Why the repository, if it is there, is not for what is private, or ""."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        is_private = HfApi().model_info(name).private
    except RepositoryNotFoundError:
        return ""
    return "" if is_private or public else "everybody sees that repository; --hub_public agrees"


def upload(folder: Path, name: str, public: bool) -> str:
    """Upload a folder to the repository `name`, which is made where it is not there; its address.
    Whatever goes wrong is an exception of the client's, or ValueError.
    """
    from huggingface_hub import HfApi, constants

    constants.HF_HUB_OFFLINE = False  # it may not have answered at the start
    api = HfApi()
    address = api.create_repo(name, private=not public, exist_ok=True)
    if problem := _privacy_problem(name, public):
        raise ValueError(problem)
    api.upload_folder(repo_id=name, folder_path=folder, commit_message="Upload the model")
    return str(address)


def upload_command(folder: Path, name: str, public: bool) -> str:
    """The command that uploads it, to be typed."""
    privacy = "--no-private" if public else "--private"
    return shlex.join(["hf", "upload", name, str(folder), ".", privacy])
