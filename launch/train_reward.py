"""A reward model (Ouyang et al. 2022, arXiv 2203.02155, section 3.5) out of a causal LM.

    deepspeed launch/train_reward.py                    # the built-in model on the built-in pairs
    deepspeed launch/train_reward.py --config launch/recipes/smollm_human_like_reward.yaml
    deepspeed --num_accelerators 2 launch/train_reward.py --model DIR --data pairs.jsonl \\
        --ds_config ds_configs/zero3.json

For a prompt x with a chosen answer y_w and a rejected answer y_l, minimises

    -log sigmoid(r(x, y_w) - r(x, y_l) - m)

averaged over all pairs of a step, r the score at the last token and m a margin that the data may
have; --loss takes others (train/losses/reward.py: LOSSES), among them those of answers that are
judged one by one. It departs from the paper in having pairs for rankings, and in not moving the
scores of human answers to a mean of 0: their mean and deviation are written down beside the model.

The score is read where transformers' AutoModelForSequenceClassification reads it, at the end of the
whole conversation as the chat template renders it, a tail behind the end token included. The
prompt's tokens stand once for both answers, packed without padding (train/data/packing.py).

Legend: a group is a prompt with its answers, here a pair, or one answer; a batch packs groups; B
examples (one a group) and N answers of a batch.
"""

import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from train import config, quiet
from train import settings as shared_flags
from train.engine import preemption


@dataclasses.dataclass
class Settings(shared_flags.Reward):
    """Train a model that gives an answer a score, on preference pairs or on judged answers."""


def main():
    preemption.install_handlers()  # SIGTERM and SIGUSR1 are noted from here on
    settings = config.parse(Settings)
    quiet.silence_libraries()
    # torch and DeepSpeed take seconds to import: --help and a wrong flag are answered before that
    from train.losses import reward as losses_of_rewards
    from train.methods import reward, reward_report, setup
    from train.run import loop, session

    with session.start(settings) as run:  # ranks, OUTPUT, logs; every exit code is decided in there
        loss = losses_of_rewards.choose(settings.loss, settings.loss_args)
        tokenizer, data, held_out = setup.open_scored_data(settings, run, loss)
        model = setup.open_reward_model(settings, run, tokenizer, data, held_out)
        report = reward_report.open_report(run, settings, loss, model, data, held_out)
        state = {"reward_model": model, "report": report}  # all that survives a restart

        for step in loop.steps(run, settings, data, state, report):
            for batch in step.batches():  # packed; as many on every rank, some may be empty
                scores = model(batch, at="last")  # (N,)
                examples = reward.examples(scores, batch, loss.row.takes_pairs)
                losses = loss(examples)  # (B,)
                # num_groups: of all batches and ranks, so this is the mean over the whole step
                model.backward(losses.sum() / step.num_groups)
                report.add(batch, examples, losses)
            step.finish(model.step())  # the loop then shows it, evaluates and saves when due

        scale = reward.measure_scale(run, loss, model, data, report.held_out)
        setup.note_scale(run, model, scale)  # in the model's configuration and its card
        # OUTPUT/model, loaded again: how far its scores are from the trained model's
        gap = setup.export_model(settings, run, model, report)
        report.finish(gap)


if __name__ == "__main__":
    main()
