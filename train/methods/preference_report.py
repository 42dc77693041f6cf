"""What preference training measures, for its report (run/report.py)."""

from functools import partial

import torch

from train.engine import dist
from train.losses import metrics
from train.losses.composition import Loss
from train.losses.preference import Labelled
from train.methods.preference import HeldOut
from train.run import commands
from train.run.report import Measures, Report


def open_report(run, settings, objective, held_out) -> Report:
    """The report of a run of preference training.

    objective: a methods.preference.Objective. held_out: a Tokenised, or None.
    """
    policy, reference, loss = objective.policy, objective.reference, objective.loss
    about_rewards = f"a reward is {loss.formula_of_rewards}"
    run.note(rewards=about_rewards)
    measures = Measures(
        metrics=metrics.METRICS,
        columns=1 + len(metrics.PAIR_SUMS),
        sums=partial(sums, loss),
        means=partial(means, has_reference=settings.reference != "none"),
        distributions=partial(distributions, loss),
        intervals=partial(intervals, loss),
        bar={
            "loss": ("loss", ".4f"),
            "margin": ("rewards/margins", ".3f"),
            "acc": ("rewards/accuracies", ".2f"),
        },
        closing=closing,
        about=about_rewards,
    )

    def next_commands():
        folder = run.folder
        models = {"model": folder.path / "model", "reference": folder.record["model"]}
        return [commands.evaluation(settings, folder.path, policy.module.lm.config, **models)]

    return Report(
        run,
        settings,
        policy,
        measures,
        objective.data,
        HeldOut(objective, held_out) if held_out else None,
        forwards=1 + reference.forwards,
        health=partial(bf16_weights_moved, run, policy, reference),
        next_commands=next_commands,
    )


def sums(loss: Loss, examples, losses: torch.Tensor) -> torch.Tensor:
    """metrics.preference_sums with the loss's own rewards."""
    return metrics.preference_sums(examples, losses, loss.rewards(examples))


def means(sums: torch.Tensor, has_reference: bool) -> dict[str, float]:
    """METRICS by name; those that compare with a reference only where there is one."""
    mean = metrics.means(sums)
    if not has_reference:
        del mean["chosen_fell"]
    return mean


def distributions(loss: Loss, examples) -> dict[str, torch.Tensor]:
    """What histograms show, (B,) each.

    Margins and log-probs of pairs, rewards and log-probs of responses that are labelled one by one.
    """
    if isinstance(examples, Labelled):
        return {"rewards": loss.rewards(examples), "logps": examples.logps}
    chosen, rejected = loss.rewards(examples)
    return {
        "margins": chosen - rejected,
        "logps_chosen": examples.chosen,
        "logps_rejected": examples.rejected,
    }


def intervals(loss: Loss, mean: dict, examples) -> dict[str, list[float]]:
    """95 % intervals of the accuracy (Wilson) and of the mean margin (normal), for the table.

    Quick ones; evaluation bootstraps (train/methods/intervals.py).
    """
    labelled = isinstance(examples, Labelled)
    n = len(examples.logps if labelled else examples.chosen)
    found = {"rewards/accuracies_interval": list(metrics.wilson(mean["rewards/accuracies"], n))}
    if not labelled:
        chosen, rejected = loss.rewards(examples)
        found |= metrics.normal_interval("rewards/margins", chosen - rejected)
    return found


def closing(last: dict) -> list[tuple]:
    """Below the closing table: how many chosen answers did not become less likely."""
    if "chosen_fell" not in last:
        return []
    return [("chosen not less likely", "", f"{1 - last['chosen_fell']:.4f}", "")]


def bf16_weights_moved(run, policy, reference) -> dict[str, float | None]:
    """`share_moved`, where the reference still is the policy as it started."""
    if not run.plan.same_weights or reference.version or reference.module is None:
        return {"bf16_weights_moved": None}
    return {"bf16_weights_moved": share_moved(policy.module, reference.module)}


@torch.no_grad()
def share_moved(module, start) -> float | None:
    """The share of weights whose bf16 copy differs from that at the start.

    At learning rates near bf16's grid many updates change a master weight and not its bf16 copy
    (train/engine/ds_config.py); this says how many came through. None where the two modules' shards
    do not line up. Every rank calls this.
    """
    counts = torch.zeros(2, dtype=torch.float64, device=next(module.parameters()).device)
    for p, q in zip(module.parameters(), start.parameters(), strict=True):
        shard, start_shard = getattr(p, "ds_tensor", p), getattr(q, "ds_tensor", q)
        if shard.shape != start_shard.shape or shard.device != start_shard.device:
            return None
        moved = (shard.bfloat16() != start_shard.bfloat16()).sum().to(counts.device)
        counts += torch.stack([moved.double(), counts.new_tensor(shard.numel())])
    moved, total = dist.all_reduce(counts).tolist()
    return moved / total
