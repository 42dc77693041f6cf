"""Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290) of a causal LM.

    deepspeed launch/train_dpo.py                       # the built-in model on the built-in pairs
    deepspeed launch/train_dpo.py --config launch/recipes/smollm_human_like.yaml
    deepspeed --num_accelerators 2 launch/train_dpo.py --model DIR --data pairs.jsonl \\
        --ds_config ds_configs/zero3.json

For a prompt x with a chosen answer y_w and a rejected answer y_l, minimises

    -log sigmoid(beta * ((log pi(y_w|x) - log pi_ref(y_w|x)) - (log pi(y_l|x) - log pi_ref(y_l|x))))

averaged over all pairs of a step, whatever the ranks and batches they are spread over; --loss takes
others of its family (train/losses/composition.py: LOSSES). It departs from the paper in the optimiser
(AdamW for RMSprop, with decoupled weight decay on matrices), and in how pairs are computed, not in
what: the prompt's tokens stand once for both answers, packed without padding (train/data/packing.py).

Legend: a group is a prompt with its answers, here a pair, or one answer with a label; a batch packs
groups; B examples (one a group) and T scored tokens of a batch.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from train import config, quiet
from train import settings as shared_flags
from train.engine import preemption


@dataclasses.dataclass
class Settings(shared_flags.Preference):
    """Train a causal language model on preference pairs with DPO."""

    reference: Literal["live", "cached", "none"] = "live"
    """Where log pi_ref comes from. live: a frozen model, scored beside the policy. cached: the
    same, scored once and kept on disk. none: nowhere, for losses that need none.
    """
    reference_model: str | None = shared_flags.flag(None, needs=shared_flags.HAS_REFERENCE)
    """The reference: a model directory or hub name. None: --model as it is at the start."""
    reference_every: int = shared_flags.flag(
        0, needs=shared_flags.Needs("reference", among=("live",))
    )
    """Steps after which a live reference moves towards the policy (TR-DPO); 0: it stands still."""
    reference_mixup: float = shared_flags.flag(0.6, needs=shared_flags.Needs("reference_every"))
    """The policy's share in a reference that moves; 1 replaces it."""
    reference_ds_config: str | None = shared_flags.flag(
        None, may_change=True, needs=(shared_flags.HAS_REFERENCE, shared_flags.REFERENCE_APART)
    )
    """DeepSpeed JSON for the reference. None: ds_configs/frozen_zero3.json beside a stage-3 policy,
    else whole on each rank.
    """

    def __post_init__(self, given):
        super().__post_init__(given)
        shared_flags.check_bounds(self, {"reference_every": 0})


def main():
    preemption.install_handlers()  # SIGTERM and SIGUSR1 are noted from here on
    settings = config.parse(Settings)
    quiet.silence_libraries()
    # torch and DeepSpeed take seconds to import: --help and a wrong flag are answered before that
    from train.losses import composition
    from train.methods import preference, preference_report, setup
    from train.run import loop, session

    with session.start(settings) as run:  # ranks, OUTPUT, logs; every exit code is decided in there
        loss = composition.choose(settings.loss, settings.beta, settings.loss_args)
        refuse(settings, loss)
        tokenizer, pairs, held_out = setup.open_data(settings, run, loss.takes_labelled)
        policy, reference = setup.open_models(settings, run, tokenizer, pairs, held_out)
        objective = preference.Objective(
            run,
            loss,
            policy,
            reference,
            pairs,
            max_length=settings.max_length,
            reference_every=settings.reference_every,
            reference_mixup=settings.reference_mixup,
        )
        report = preference_report.open_report(run, settings, objective, held_out)
        state = {  # all that survives a restart
            "policy": policy,
            "reference": reference,
            "running_mean": objective.running_mean,  # of BCO's rewards
            "report": report,
        }

        for step in loop.steps(run, settings, pairs, state, report):
            objective.begin(step)  # KTO, BCO and AOT score the whole step; the others do nothing
            for batch in step.batches():  # packed; as many on every rank, some may be empty
                ref_logps = objective.ref_logps(batch)  # (T,) nats, no gradient
                # (T,) nats; WPO's weights need log sum_v p_v^2 beside them, from the same head
                logps = policy(batch, log_p2=loss.shared.use_weighting)
                scored = objective.score(logps, ref_logps, batch)  # B examples: summed log-probs
                losses = objective.losses(scored)  # (B,)
                # num_groups: of all batches and ranks, so this is the mean over the whole step
                policy.backward(losses.sum() / step.num_groups)
                report.add(batch, scored.examples, losses)
            update = policy.step()  # reduce over ranks, clip, AdamW, schedule
            objective.end(step, update)  # TR-DPO's reference moves where it is time
            step.finish(update)  # the loop then shows it, evaluates and saves when due, or stops

        # OUTPUT/model, loaded again: how far its log-probs are from the trained model's
        gap = setup.export_model(settings, run, policy, report)
        report.finish(gap)


def refuse(settings, loss):
    """ValueError where the loss and the reference do not go together."""
    if settings.reference == "none" and loss.needs_reference:
        raise ValueError(f"--loss {settings.loss} needs a reference: --reference live or cached")
    if settings.reference == "cached" and loss.needs_mismatched:
        raise ValueError(
            f"--loss {settings.loss} scores responses to other prompts, drawn anew at each step: "
            "--reference live"
        )
    if settings.reference_every and settings.lora_rank:
        raise ValueError(
            "--reference_every moves weights towards the policy's, and with --lora_rank those stand "
            "still"
        )
    if not 0 < settings.reference_mixup <= 1:
        raise ValueError(f"--reference_mixup lies in (0, 1], not at {settings.reference_mixup}")


if __name__ == "__main__":
    main()
