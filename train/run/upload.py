"""OUTPUT/model on the model hub: looked at before a run begins, uploaded when all is done."""

import json
import logging
from pathlib import Path

from train import hub
from train.config import named
from train.engine import dist, preemption
from train.files import write_json


def check(run, settings):
    """ValueError where --push_to_hub cannot come to anything. Every rank calls this."""
    problem = warning = None
    if dist.is_main():
        try:
            if name := _repository(run, settings):
                warning = hub.check_upload(name, settings.hub_public)
        except ValueError as error:
            problem = str(error)
    problem, warning = dist.broadcast((problem, warning))
    if problem:
        raise ValueError(problem)
    if warning:
        run.say(f"warning: --push_to_hub {settings.push_to_hub} is not checked: {warning}")


def push(run, settings):
    """Upload OUTPUT/model where --push_to_hub says so and that has not been done. What goes wrong is
    said, with the command that does it later: the model is there in any case. For a run that is done
    and has left its job.
    """
    name = _repository(run, settings) if dist.is_main() else None
    if not name:
        return
    preemption.obey_signals()  # nothing is left to save
    model = run.folder.path / "model"
    later = hub.upload_command(model, name, settings.hub_public)
    try:
        address = hub.upload(model, name, settings.hub_public)
    except KeyboardInterrupt:
        run.say(f"{model} was not uploaded; later: {later}")
        raise
    except Exception as error:  # the client has dozens of types, and none may cost the run
        logging.getLogger("zeropref").warning("upload", exc_info=True)
        run.say(f"warning: {model} was not uploaded ({named(error)}); later: {later}")
        return
    path = _run_json(run)
    record = json.loads(path.read_text(encoding="utf-8"))
    write_json(path, record | {"hub": {"repository": name, "address": address}})
    run.say(f"hub          {address}")


def _repository(run, settings) -> str | None:
    """Where the model is to be uploaded, and is not yet; an evaluation has none."""
    name = getattr(settings, "push_to_hub", None)
    if not name or not run.folder.finished:
        return name
    record = json.loads(_run_json(run).read_text(encoding="utf-8"))
    return None if record.get("hub", {}).get("repository") == name else name


def _run_json(run) -> Path:
    return run.folder.path / "run.json"
