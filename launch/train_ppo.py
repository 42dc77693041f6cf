"""Reinforcement learning from rewards: PPO (Schulman et al. 2017, arXiv 1707.06347; for language models
Ziegler et al. 2019, arXiv 1909.08593) and its family.

    deepspeed launch/train_ppo.py                       # the built-in model, prompts and reward
    deepspeed launch/train_ppo.py --algorithm ppo --model DIR --data prompts.jsonl \\
        --reward_model runs/reward/model
    deepspeed launch/train_ppo.py --algorithm grpo --data problems.jsonl --reward number:answer

A rollout answers a few prompts with the policy as it is, and rewards the answers. What follows are
updates that make tokens likelier by their advantages A, with r the ratio of a token's probability to
what it was when it was drawn:

    loss = - mean over tokens of min(r A, clip(r, 1 - low, 1 + high) A)

How advantages are made, what the ratio is of, what is clipped, and what the mean is over, are the
columns of train/losses/algorithms.py's ALGORITHMS, a row of which --algorithm names.

The prompt's tokens stand once for all of its samples, packed without padding
(train/data/packing.py). Old log-probabilities come from the very batches that are trained on: in a
rollout's first update r is exactly 1.

Legend: a group is a prompt with its samples; a batch packs groups; T tokens of a batch's answers.
"""

import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from train import config, quiet
from train import settings as shared_flags
from train.engine import preemption


@dataclasses.dataclass
class Settings(shared_flags.Policy):
    """Train a causal language model to earn rewards for what it writes, with PPO and its family."""


def main():
    preemption.install_handlers()  # SIGTERM and SIGUSR1 are noted from here on
    settings = config.parse(Settings)
    quiet.silence_libraries()
    # torch and DeepSpeed take seconds to import: --help and a wrong flag are answered before that
    from train.losses import policy as losses
    from train.methods import policy_report, policy_setup, ppo
    from train.run import loop, session

    with session.start(settings) as run:  # ranks, OUTPUT, logs; every exit code is decided in there
        algorithm = ppo.choose_algorithm(settings)
        tokenizer, prompts, held_out = policy_setup.open_prompts(settings, run)
        rewards = policy_setup.open_rewards(settings, run, prompts, held_out)
        models = policy_setup.open_models(settings, run, tokenizer, algorithm, prompts, held_out)
        policy, critic = models.policy, models.critic
        report = policy_report.PolicyReport(run, settings, algorithm, models, rewards, held_out)
        collector = ppo.Collector(run, settings, algorithm, models, rewards, prompts, report)
        state = collector.state | {
            "policy": policy,
            "report": report,
        }  # all that survives a restart

        for step in loop.rollouts(run, settings, prompts.data, state, report):
            # drawn, rewarded and scored; or what a checkpoint has kept of it
            rollout = collector.collect(step)
            for minibatch in collector.minibatches(step, rollout):
                for (
                    batch
                ) in minibatch.batches():  # packed; as many on every rank, some may be empty
                    known = rollout.of_batch(batch)  # old log-probs, advantages: (T,) each
                    logps = policy(batch, temperature=settings.temperature)  # (T,) nats
                    found = losses.policy_loss(algorithm, logps, known)  # sums over the batch
                    # over the whole minibatch, of all ranks: tokens, samples, or a constant
                    if minibatch.trains_policy:  # not while a value model warms up
                        policy.backward(found.loss / minibatch.denominator)
                    of_values = None
                    if critic:
                        values = critic(batch, at="before")  # (T,)
                        of_values = losses.value_loss(algorithm, values, known)
                        critic.backward(of_values.loss / minibatch.num_tokens)
                    report.add(minibatch.sums(found, of_values))
                minibatch.finish()  # both optimisers step; a checkpoint may be made from here on
            step.finish()  # the loop then shows it, evaluates and saves when due

        gap, critic_folder = collector.export()  # OUTPUT/model, loaded again and compared
        report.finish(gap, critic_folder)


if __name__ == "__main__":
    main()
