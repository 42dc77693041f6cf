"""Run by torchrun in test_invariance.py: one step's gradient under every ZeRO stage and token
budget, written as one file.

    torchrun --nproc_per_node N tests/engine/gradient_worker.py LOSS MODEL_DIR OUT [STAGE ...]

LOSS: dpo, or one of a score model's.
"""

import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch

from tests.engine.made_pairs import BETA, BUDGETS, CLIP, made_pairs, with_targets
from train import quiet
from train.data import steps
from train.engine import dist, ds_config, loading, prefetch, trained
from train.losses import composition
from train.losses import reward as losses_of_rewards
from train.methods import preference, reward
from train.methods.reference import Live


def one_step(name, model, data, device, stage, budget):
    """The step's gradient as AdamW saw it, by parameter: after one update exp_avg is (1 - beta1)
    times it.
    """
    config = ds_config.read_config(ROOT / f"ds_configs/zero{stage}.json")
    # else a model this small stays whole
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    resolved = ds_config.resolve(config, "fp32", CLIP)
    load = loading.load_backbone if name == "dpo" else loading.load_score_model
    policy = trained.TrainedModel(
        load(model, resolved, "fp32", stage, device),
        resolved,
        lr=1e-3,
        weight_decay=0.0,
        grad_clip=CLIP,
        scheduler="constant",
        warmup_ratio=0.0,
        total_steps=1,
    )
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
    from deepspeed.utils import safe_get_full_optimizer_state

    found = {}
    for name, p in policy.module.lm.named_parameters():
        moment = (
            policy.optimizer.state[p]["exp_avg"]
            if stage == 0
            else safe_get_full_optimizer_state(p, "exp_avg")
        )
        found[name] = moment.detach().cpu().clone() / 0.1
    return found, update.grad_norm


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


def main():
    name, model, out, *stages = sys.argv[1:]
    quiet.silence_libraries()
    device = dist.init()
    data = made_pairs()
    if name != "dpo":
        data = with_targets(data, singles=name == "squared")
    results, norms = {}, {}
    for stage in map(int, stages or "0123"):
        for budget in BUDGETS:
            results[stage, budget], norms[f"{stage},{budget}"] = one_step(
                name, model, data, device, stage, budget
            )
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
