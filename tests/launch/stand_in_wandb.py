"""As much of wandb as accelerate's tracker calls. Appends to the file $STAND_IN what it is told, as
JSON; kills its process, once, on being told of step $STAND_IN_KILLS.
"""

import json
import os
import signal
from pathlib import Path

TOLD = Path(os.environ["STAND_IN"])
KILLS = os.environ.get("STAND_IN_KILLS")


def tell(**what):
    with open(TOLD, "a", encoding="utf-8") as file:
        print(json.dumps(what | {"process": os.getpid()}), file=file)


class Run:
    """A run, begun by `init`."""

    url, offline = "https://stand-in/run", False

    def __init__(self, run_id):
        self.id = run_id

    def log(self, values, step=None):
        tell(step=step, values=values)
        if KILLS == str(step) and not TOLD.with_suffix(".killed").exists():
            TOLD.with_suffix(".killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)

    def finish(self):
        tell(finished=True)


class Config:
    """wandb.config."""

    def update(self, values, allow_val_change=False):
        tell(config=values)


config = Config()


def init(project, **options):
    tell(project=project, options=options)
    return Run(options.get("id", "generated"))
