"""Run by torchrun in test_invariance.py: one step's gradient under every ZeRO stage and token
budget, written as one file.

    torchrun --nproc_per_node N tests/engine/gradient_worker.py LOSS MODEL_DIR OUT [ALGORITHM ...]

LOSS: dpo, or one of a score model's, or none. ALGORITHM: of reinforcement learning, besides, with
MODEL_DIR-critic for a value model.
"""

import contextlib
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch

from tests.engine import made_rollouts
from tests.engine.made_pairs import BETA, BUDGETS, CLIP, made_pairs, with_targets
from train import quiet
from train.data import steps
from train.engine import dist, ds_config, loading, prefetch, trained
from train.losses import composition
from train.losses import policy as losses_of_policies
from train.losses import reward as losses_of_rewards
from train.methods import preference, reward
from train.methods.policy_setup import Models
from train.methods.ppo import Collector
from train.methods.reference import Live, NoReference


def one_step(name, model, data, device, stage, budget):
    """The step's gradient as AdamW saw it, by parameter: after one update exp_avg is (1 - beta1)
    times it.
    """
    load = loading.load_backbone if name == "dpo" else loading.load_score_model
    policy, resolved = under_deepspeed(load, model, stage, device, grad_clip=CLIP, lr=1e-3)
    losses_of = scores_loss(name) if name != "dpo" else dpo_loss(model, resolved, stage, device)
    planned = steps.plan_steps(
        data.lengths.sum(1),
        len(data),
        budget,
        seed=0,
        total=1,
        rank=dist.rank(),
        world=dist.world_size(),
    )
    for plan, batches in prefetch.packed(((p, p.batches) for p in planned), data, device):
        for batch in batches:
            policy.backward(losses_of(policy, batch).sum() / len(plan.groups))
    update = policy.step()
    return {name: moment / 0.1 for name, moment in moments(policy)}, update.grad_norm


def under_deepspeed(load, path, stage, device, *, grad_clip, **options):
    """(a TrainedModel, its resolved configuration)"""
    config = ds_config.read_config(ROOT / f"ds_configs/zero{stage}.json")
    # else a model this small stays whole
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    resolved = ds_config.resolve(config, "fp32", grad_clip)
    model = trained.TrainedModel(
        load(path, resolved, "fp32", stage, device),
        resolved,
        weight_decay=0.0,
        grad_clip=grad_clip,
        scheduler="constant",
        warmup_ratio=0.0,
        total_steps=1,
        **options,
    )
    return model, resolved


def moments(trained_model):
    """Yield (name, AdamW's exp_avg) of every parameter. Every rank goes through them."""
    from deepspeed.utils import safe_get_full_optimizer_state

    for name, p in trained_model.module.lm.named_parameters():
        moment = (
            trained_model.optimizer.state[p]["exp_avg"]
            if trained_model.stage == 0
            else safe_get_full_optimizer_state(p, "exp_avg")
        )
        yield name, moment.detach().cpu().clone()


def dpo_loss(model, resolved, stage, device):
    """What gives a batch's losses of DPO, (B,)."""
    frozen = ds_config.resolve_frozen(
        ds_config.read_config(ROOT / "ds_configs/frozen_zero3.json") if stage == 3 else {}, resolved
    )
    reference = Live(loading.load_backbone(f"{model}-ref", frozen, "fp32", stage, device), frozen)
    loss = composition.choose("sigmoid", BETA, {})

    def losses(policy, batch):
        ref_logps = reference(batch)
        scored = preference.score_batch(policy(batch), ref_logps, batch, loss)
        return loss(scored.examples)

    return losses


def scores_loss(name):
    """What gives a batch's losses of scores, (B,)."""
    loss = losses_of_rewards.choose(name, {})

    def losses(model, batch):
        return loss(reward.examples(model(batch, at="last"), batch, loss.row.takes_pairs))

    return losses


def updates_of(names, model, device, stage):
    """Yield ((algorithm, budget, number of the update, "policy" or "critic"), its gradient, its norm)
    of one pass over the made rollout.

    One pair of models does them all: at a rate of 0 no weight moves, and with beta1 = 0 AdamW's
    exp_avg is the last gradient.
    """
    made = torch.load(f"{model}-rollouts.pt")
    options = dict(grad_clip=made_rollouts.CLIP, lr=0.0, betas=(0.0, 0.999))
    policy, _ = under_deepspeed(loading.load_backbone, model, stage, device, **options)
    critic, _ = under_deepspeed(
        loading.load_score_model, f"{model}-critic", stage, device, **options
    )
    score = made_rollouts.made_scores()
    for name in names:
        algorithm = made_rollouts.algorithm_row(name)
        mine = critic if algorithm.needs_critic else None
        for budget in made_rollouts.BUDGETS:
            norms = []
            step = SimpleNamespace(
                number=0,
                computes=lambda batch: None,
                updated=lambda number, updates, norms=norms: norms.append(
                    [update.grad_norm for _, update in updates]
                ),
                settle=lambda: None,
            )
            collector = Collector(
                run=SimpleNamespace(device=device, plan=SimpleNamespace(batch_tokens=budget)),
                settings=SimpleNamespace(**made_rollouts.SETTINGS),
                algorithm=algorithm,
                models=Models(policy, NoReference(), mine, None),
                rewards=None,
                prompts=None,
                report=SimpleNamespace(
                    timed=lambda name: contextlib.nullcontext(), add=lambda sums: None
                ),
            )
            rollout = collector._with_advantages(
                made_rollouts.made_answers(), score[:, None], score.copy(), dict(made[name])
            )
            for number, minibatch in enumerate(collector.minibatches(step, rollout)):
                for batch in minibatch.batches():
                    known = rollout.of_batch(batch)
                    logps = policy(batch, temperature=made_rollouts.TEMPERATURE)
                    found = losses_of_policies.policy_loss(algorithm, logps, known)
                    policy.backward(found.loss / minibatch.denominator)
                    of_values = None
                    if mine:
                        values = mine(batch, at="before")
                        of_values = losses_of_policies.value_loss(algorithm, values, known)
                        mine.backward(of_values.loss / minibatch.num_tokens)
                    minibatch.sums(found, of_values)
                minibatch.finish()
                trained_ones = [("policy", policy)] + [("critic", critic)] * bool(mine)
                for (part, each), norm in zip(trained_ones, norms[-1], strict=True):
                    yield (name, budget, number, part), dict(moments(each)), norm


def main():
    name, model, out, *algorithms = sys.argv[1:]
    quiet.silence_libraries()
    device = dist.init()
    data = made_pairs()
    if name != "dpo":
        data = with_targets(data, singles=name == "squared")
    results, norms = {}, {}
    for stage in range(4):
        for budget in BUDGETS if name != "none" else ():
            results[stage, budget], norms[f"{stage},{budget}"] = one_step(
                name, model, data, device, stage, budget
            )
        if algorithms:
            for key, gradient, norm in updates_of(algorithms, model, device, stage):
                key = (stage, *key)
                results[key], norms[",".join(map(str, key))] = gradient, norm
    if dist.is_main():
        torch.save(results, out)
        Path(out).with_suffix(".json").write_text(json.dumps(norms))
    dist.barrier()
    dist.shutdown()
    # A dozen engines leave threads of C++ behind, over which an interpreter that takes itself down
    # sometimes aborts; how a process ends is not what is tested here.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


main()
