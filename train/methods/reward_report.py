"""What the training of a reward model measures, for its report (run/report.py)."""

from functools import partial

import torch

from train.engine import dist
from train.losses import metrics
from train.losses.metrics import wilson
from train.losses.reward import Loss, ScoredAnswers
from train.methods import baselines
from train.methods.reward import HeldOut
from train.models import pretrained
from train.run import commands
from train.run.card import BASELINES
from train.run.report import Measures, Report


def open_report(run, settings, loss: Loss, model, data, held_out) -> Report:
    """The report of a run that trains a reward model on `data`, a Tokenised. held_out: another, or
    None; of pairs it is measured how far one gets without a model.
    """
    of_pairs = loss.row.takes_pairs
    if of_pairs and held_out and dist.is_main():
        run.note(baselines=baselines.measure(data, held_out)._asdict())
    bar = {"loss": ("loss", ".4f")}
    if of_pairs:
        bar |= {"margin": ("rewards/margins", ".3f"), "acc": ("rewards/accuracies", ".2f")}
    else:
        bar |= {"r": ("rewards/correlation", ".2f")}
    measures = Measures(
        metrics=metrics.REWARD_METRICS,
        columns=1 + len(metrics.SCORE_SUMS),
        sums=metrics.score_sums,
        means=partial(metrics.score_means, of_pairs=of_pairs),
        distributions=distributions,
        intervals=intervals,
        bar=bar,
        noun="pairs" if of_pairs else "answers",
        closing=partial(closing, run.folder.record),
    )

    def next_commands():
        folder = run.folder.path
        trust = commands.trust(settings)
        judge = {"reward_model": folder / "model"}
        policy = {}
        began_with = run.folder.record["model"]
        if not pretrained.is_reward_model(began_with, settings.trust_remote_code):
            policy |= {"model": settings.model}  # else the built-in one: that writes nothing
        policy |= commands.same_data(settings) | commands.lengths_of_rollouts(settings)
        return [
            commands.deepspeed(commands.EVALUATE, judge | {"output": folder / "eval"} | trust),
            commands.deepspeed(commands.PPO, policy | judge | {"output": folder / "ppo"} | trust),
        ]

    return Report(
        run,
        settings,
        model,
        measures,
        data,
        HeldOut(run, loss, model, held_out) if held_out else None,
        next_commands=next_commands,
    )


def distributions(examples) -> dict[str, torch.Tensor]:
    """What histograms show, (B,) each."""
    if isinstance(examples, ScoredAnswers):
        return {"rewards": examples.scores}
    return {
        "margins": examples.difference(),
        "rewards_chosen": examples.chosen,
        "rewards_rejected": examples.rejected,
    }


def intervals(mean: dict, examples) -> dict[str, list[float]]:
    """95 % intervals of the accuracy (Wilson) and of the mean margin (normal), for the table."""
    n = len(examples[0])
    found = {}
    if "rewards/accuracies" in mean:
        found["rewards/accuracies_interval"] = list(wilson(mean["rewards/accuracies"], n))
    if not isinstance(examples, ScoredAnswers):
        found |= metrics.normal_interval("rewards/margins", examples.difference())
    return found


def closing(record: dict, last: dict) -> list[tuple]:
    """Below the closing table: the accuracies that need no model. record: of run.json."""
    return [
        (title, "", f"{record['baselines'][name]:.4f}", "accuracy without a model")
        for name, title in BASELINES.items()
        if "baselines" in record
    ]
