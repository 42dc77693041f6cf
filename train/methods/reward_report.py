"""What the training of a reward model measures, for its report (run/report.py)."""

import math
from functools import partial

import torch

from train.losses import metrics
from train.losses.metrics import wilson, wins
from train.losses.reward import Loss, ScoredAnswers
from train.methods.reward import HeldOut
from train.run.report import Measures, Report


def open_report(run, settings, loss: Loss, model, held_out) -> Report:
    """The report of a run that trains a reward model. held_out: a Tokenised, or None."""
    of_pairs = loss.row.takes_pairs
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
        closing=partial(closing, held_out if of_pairs else None),
    )

    def next_commands():
        model_path = run.folder.path / "model"
        return [f"deepspeed eval/evaluate.py --model POLICY --reward_model {model_path}"]

    return Report(
        run,
        settings,
        model,
        measures,
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
        margins = examples.difference()
        half = 1.959964 * float(margins.std()) / math.sqrt(n) if n > 1 else math.nan
        middle = float(margins.mean())
        found["rewards/margins_interval"] = [middle - half, middle + half]
    return found


def closing(held_out, last: dict) -> list[str]:
    """Below the closing table: what needs no model, the longer answer. held_out: pairs, or None."""
    if held_out is None:
        return []
    lengths = torch.from_numpy(held_out.lengths[:, 1:].astype("int64"))  # (B, 2) tokens
    longer = float(wins(lengths[:, 0] - lengths[:, 1]).mean())
    return [f"{'longer answer wins':<22} {'':>9}  {longer:>9.4f}   accuracy without a model"]
