"""A launch script with two trained models, as PPO will have: what tests/run/test_checkpoint.py runs.

The policy learns the chosen answers, the other model the rejected ones, each under AdamW of its own.
Run by tests/launch/warm.py, or by hand:

    torchrun --nproc_per_node 2 tests/run/two_models.py --model DIR --data pairs.jsonl --output OUT
"""

import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from train import config, quiet
from train import settings as shared_flags
from train.engine import preemption


@dataclasses.dataclass
class Settings(shared_flags.Training):
    """Train two models at once."""

    output: str = "runs/two"
    """Folder for checkpoints."""
    fault: str | None = None
    """What goes wrong in the second step: memory, value."""


FAULTS = {
    "memory": RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 9 GB"),
    "value": ValueError("something of the trainer's own"),
}


def main():
    preemption.install_handlers()
    settings = config.parse(Settings)
    quiet.silence_libraries()
    import torch

    from train.engine import dist, ds_config, loading
    from train.engine.trained import TrainedModel
    from train.methods import setup
    from train.run import loop, session

    class Losses:
        """The sums that were minimised: this run's report."""

        def __init__(self):
            self.values, self.unread = [], torch.zeros(2, dtype=torch.float64)

        def add(self, losses):
            self.unread += torch.stack(losses).detach().double()

        def end_step(self, step):
            self.values.append(dist.all_reduce(self.unread).tolist())
            self.unread = torch.zeros(2, dtype=torch.float64)

        def state_dict(self):
            return {"values": list(self.values)}

        def load_state_dict(self, state):
            self.values = state["values"]

        def rank_tensors(self):
            unread = self.unread.clone()
            return lambda: {"unread": unread}

        def load_rank_tensors(self, of_ranks):
            for tensors in of_ranks:
                self.unread += tensors["unread"]

        def pause(self):
            return torch.no_grad()

        def start(self):
            pass

        def step(self, step, update):
            pass

        evaluate = forget_evaluations = lambda self, number=None: None
        sync = close = start

    with session.start(settings) as run:
        tokenizer, pairs, _ = setup.open_data(settings, run, takes_labelled=False)
        resolved = ds_config.resolve(ds_config.read_config(settings.ds_config), "fp32", 1.0)
        if "zero_optimization" in resolved:  # else models this small stay whole
            resolved["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        models = []
        for lr in (1e-3, 3e-3):
            models.append(
                TrainedModel(
                    loading.load_backbone(
                        settings.model,
                        resolved,
                        "fp32",
                        ds_config.zero_stage(resolved),
                        run.device,
                    ),
                    resolved,
                    lr=lr,
                    weight_decay=0.1,
                    grad_clip=1.0,
                    scheduler="linear",
                    warmup_ratio=0.3,
                    total_steps=settings.max_steps,
                    tokenizer=tokenizer,
                )
            )
        policy, value = models
        run.set_plan(session.Plan("fp32", settings.micro_tokens, settings.max_steps, False))
        report = Losses()
        state = {"policy": policy, "value": value, "report": report}
        for step in loop.steps(run, settings, pairs, state, report):
            for batch in step.batches():
                if settings.fault and step.number == 1:
                    raise FAULTS[settings.fault]
                responses = torch.arange(batch.num_responses) % 2  # chosen and rejected in turn
                side = responses.repeat_interleave(batch.lengths)  # (T,)
                losses = [-model(batch)[side == i].sum() for i, model in enumerate(models)]
                for model, loss in zip(models, losses, strict=True):
                    model.backward(loss / step.num_groups)
                report.add(losses)
            update = policy.step()
            value.step()
            step.finish(update)
        run.folder.finish()


if __name__ == "__main__":
    main()
