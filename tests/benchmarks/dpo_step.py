"""What one DPO step costs, ours against others': seconds, pairs a second and peak memory on the
same pairs.

    python tests/benchmarks/dpo_step.py --data PAIRS.jsonl
    python tests/benchmarks/dpo_step.py --data PAIRS.jsonl --pairs 16 --rounds 1 \
        --contenders ours trl --json OUT.json

(TRL comes with the extra: pip install -e '.[peers]'.) A step is policy forward, reference forward,
backward, clipping and AdamW update. Contenders, with the name's number the pairs of a micro-batch:

    ours      the loop of launch/train_dpo.py at ZeRO stage 0: packed batches, shared prompts,
              chunked head, the measures and TensorBoard of every step, clipping and the non-finite
              check
    padded/m  the same loop over plain batches: one padded sequence a response, full logits,
              micro-batches of m pairs
    trl/m     TRL's DPOTrainer, gradient accumulation up to the step's pairs. Its defaults, but no
              activation checkpointing (faster without; the others do without; --trl-checkpointing
              puts its default back), no reports, no checkpoints. It gets our token ids, so that all
              see the same pairs.

All train fp32 weights at one constant learning rate, beta and clipping; bf16 is autocast over them.
Contenders take turns, a fresh process each per round: loading, tokenisation and making the
optimiser are not timed. A process runs one step to warm up, then --steps measured ones, all on the
first --pairs pairs of --data that survive tokenisation. Ours and padded are timed from the end of a
step to the end of the next, TRL from on_step_begin to on_step_end, which leaves out its collation.
What is measured besides, and how: tests/benchmarks/contest.py. The losses of the warm-up and of the
first measured step must agree between contenders (within 2e-3 in fp32, else the exit status is 1; in
bf16 the differences are only shown).
"""

import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import transformers

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.benchmarks import contest
from train import quiet
from train.data import tokens
from train.engine import checks, dist, ds_config, loading, memory, prefetch, trained
from train.losses import composition
from train.methods import preference, preference_report
from train.methods.reference import Live
from train.models import pretrained
from train.run import folder, loop, meter, session

# The reference workload's, but beta: at its 1.0 the second loss of these few pairs is 0 for all,
# and shows nothing.
LR, BETA = 5e-6, 0.1


def open_pairs(job):
    """The tokenizer and the first pairs that survive tokenisation, through the training code's own
    cache.
    """
    tokenizer = pretrained.load_tokenizer(job["model"])
    options = dict(
        max_length=contest.MAX_LENGTH, max_prompt_length=contest.MAX_PROMPT, max_dropped=1.0
    )
    data = tokens.prepare([job["data"]], tokenizer, **options)
    if len(data) < job["pairs"]:
        raise ValueError(
            f"{job['data']} has {len(data)} usable pairs, fewer than --pairs {job['pairs']}"
        )
    return tokenizer, data.select(range(job["pairs"]))


def in_house(job, micro) -> dict:
    """The loop of launch/train_dpo.py: packed batches, or with `micro` padded ones of that many
    pairs.
    """
    quiet.silence_libraries()
    device = dist.init()
    _, data = open_pairs(job)
    run = session.Run(folder.RunFolder(job["folder"], {}), device)
    objective, report = _open_models(job, data, run, "padded" if micro else "packed")
    planned = contest.planned_steps(job, micro, data, run.plan.batch_tokens)
    seconds, losses, batches = _train(planned, data, run, objective, report)
    useful, own = contest.operations(
        objective.policy.module, data, batches, bool(micro), forwards=4
    )
    report.close()
    dist.shutdown()
    return {
        "seconds": seconds,
        "losses": losses,
        "peak_gb": meter.peak_memory(device),
        "useful_flops": useful,
        "own_flops": own,
        "rows": [batch.input_ids.shape[0] for batch in batches],
        "budget": run.plan.batch_tokens,
    }


def _open_models(job, data, run, layout):
    """The objective and the reporter as launch/train_dpo.py makes them, after its start check."""
    precision, steps_of_run = job["precision"], 1 + job["steps"]
    ds = ds_config.resolve(
        ds_config.read_config(ROOT / "ds_configs/zero0.json"), precision, contest.CLIP
    )
    module, frozen = (
        loading.load_backbone(job["model"], ds, precision, 0, run.device, layout=layout)
        for _ in range(2)
    )
    policy = trained.TrainedModel(
        module,
        ds,
        lr=LR,
        weight_decay=0.0,
        grad_clip=contest.CLIP,
        scheduler="constant",
        warmup_ratio=0.0,
        total_steps=steps_of_run,
    )
    reference = Live(frozen, ds_config.resolve_frozen({}, ds))
    batch_tokens = job["micro_tokens"] or memory.default_batch_tokens(
        module, run.device, 0, False, contest.MAX_LENGTH
    )
    run.plan = session.Plan(precision, batch_tokens, steps_of_run, same_weights=True)
    if layout == "packed":
        checks.check_start(policy, reference, data, run.device, precision, same_weights=True)
    loss = composition.choose("sigmoid", BETA, {})
    objective = preference.Objective(
        run, loss, policy, reference, data, max_length=contest.MAX_LENGTH
    )
    flags = SimpleNamespace(beta=BETA, log_every=1, reference="live")
    report = preference_report.open_report(run, flags, objective, None)
    report.start()
    return objective, report


def _train(planned, data, run, objective, report):
    """Seconds and mean loss of each step, and the last step's batches."""
    policy, seconds, means, last = objective.policy, [], [], contest.now(run.device)
    ahead = prefetch.packed(((plan, plan.batches) for plan in planned), data, run.device)
    for plan, batches in ahead:
        step = loop.Step(run, plan, batches)
        mean = 0.0
        objective.begin(step)
        for batch in step.batches():
            ref_logps = objective.ref_logps(batch)
            scored = objective.score(policy(batch), ref_logps, batch)
            losses = objective.losses(scored)
            policy.backward(losses.sum() / step.num_groups)
            report.add(batch, scored.examples, losses)
            mean = mean + losses.detach().sum() / step.num_groups
        update = policy.step()
        objective.end(step, update)
        report.step(step, update)
        seconds.append(contest.now(run.device) - last)
        means.append(float(mean))
        last = contest.now(run.device)
    return seconds, means, batches


def trl(job, micro) -> dict:
    """TRL's DPOTrainer on the same token ids."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    tokenizer, data = open_pairs(job)
    groups = [data.group(i) for i in range(len(data))]
    columns = {
        "prompt_ids": [list(g.prompt) for g in groups],
        "chosen_ids": [list(g.responses[0]) for g in groups],
        "rejected_ids": [list(g.responses[1]) for g in groups],
    }
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    args = DPOConfig(
        job["folder"], learning_rate=LR, beta=BETA, **contest.trainer_options(job, micro, device)
    )

    class Tokenised(DPOTrainer):
        def _prepare_dataset(self, dataset, *_, **__):
            return dataset  # it holds ids already

    clock = contest.clock(device)
    models = [
        transformers.AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
        for _ in range(2)
    ]
    trainer = Tokenised(
        *models,
        args=args,
        train_dataset=Dataset.from_dict(columns),
        processing_class=tokenizer,
        callbacks=[clock],
    )
    trainer.train()
    return {"seconds": clock.seconds, "losses": clock.losses, "peak_gb": meter.peak_memory(device)}


if __name__ == "__main__":
    contenders = {"ours": in_house, "padded": in_house, "trl": trl}
    contest.run(contest.Contest(__file__, __doc__, contenders, open_pairs))
