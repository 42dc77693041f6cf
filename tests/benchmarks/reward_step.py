"""What one step of a reward model costs, ours against others': seconds, pairs a second and peak
memory on the same pairs.

    python tests/benchmarks/reward_step.py --data PAIRS.jsonl
    python tests/benchmarks/reward_step.py --data PAIRS.jsonl --pairs 16 --trl-micro 1 2 4 8 16 \
        --contenders ours trl --json OUT.json

(TRL comes with the extra: pip install -e '.[peers]'.) A step is forward, backward, clipping and
AdamW update of a causal LM's body with a drawn head, the same for all. Contenders, with the name's
number the pairs of a micro-batch:

    ours      the loop of launch/train_reward.py at ZeRO stage 0: packed batches, shared prompts, the
              measures and TensorBoard of every step, clipping and the non-finite check
    padded/m  the same loop over plain batches: one padded sequence a response, micro-batches of m
              pairs
    trl/m     TRL's RewardTrainer, gradient accumulation up to the step's pairs. Its defaults, but no
              activation checkpointing (faster without; the others do without; --trl-checkpointing
              puts its default back), no reports, no checkpoints. It gets our token ids, so that all
              see the same pairs, and a pad token that no text ends in.

All train fp32 weights at one constant learning rate and clipping; bf16 is autocast over them.
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

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.benchmarks import contest
from train import quiet
from train.data import padding, tokens
from train.engine import checks, dist, ds_config, loading, memory, prefetch, trained
from train.losses import reward as losses_of_rewards
from train.methods import reward, reward_report
from train.models import heads, pretrained
from train.run import folder, loop, meter, session

LR, SEED = 1e-5, 0  # the default run's rate; of the head
FORWARDS = 3  # that a step is worth, the backward pass counting two


def open_pairs(job):
    """The tokenizer and the first pairs that survive tokenisation, as launch/train_reward.py reads
    them.
    """
    tokenizer = pretrained.load_tokenizer(job["model"])
    data = tokens.prepare(
        [job["data"]],
        tokenizer,
        max_length=contest.MAX_LENGTH,
        max_prompt_length=contest.MAX_PROMPT,
        max_dropped=1.0,
        keep_tail=True,
    )
    if len(data) < job["pairs"]:
        raise ValueError(
            f"{job['data']} has {len(data)} usable pairs, fewer than --pairs {job['pairs']}"
        )
    return tokenizer, data.select(range(job["pairs"]))


def in_house(job, micro) -> dict:
    """The loop of launch/train_reward.py: packed batches, or with `micro` padded ones of that many
    pairs.
    """
    quiet.silence_libraries()
    device = dist.init()
    tokenizer, data = open_pairs(job)
    run = session.Run(folder.RunFolder(job["folder"], {}), device)
    loss = losses_of_rewards.choose("bradley_terry", {})
    model = _open_model(job, tokenizer, data, run, "padded" if micro else "packed")
    report = reward_report.open_report(run, SimpleNamespace(log_every=1), loss, model, data, None)
    report.start()
    planned = contest.planned_steps(job, micro, data, run.plan.batch_tokens)
    seconds, losses, batches = _train(planned, data, run, loss, model, report)
    useful, own = contest.operations(model.module, data, batches, bool(micro), FORWARDS)
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


def _open_model(job, tokenizer, data, run, layout):
    """The model as launch/train_reward.py makes it, after its start check; settles the plan."""
    precision, steps_of_run = job["precision"], 1 + job["steps"]
    ds = ds_config.resolve(
        ds_config.read_config(ROOT / "ds_configs/zero0.json"), precision, contest.CLIP
    )
    module = loading.load_score_model(
        job["model"], ds, precision, 0, run.device, layout=layout, seed=SEED
    )
    padding.use(tokenizer, module.lm.config, [data])
    model = trained.TrainedModel(
        module,
        ds,
        lr=LR,
        weight_decay=0.0,
        grad_clip=contest.CLIP,
        scheduler="constant",
        warmup_ratio=0.0,
        total_steps=steps_of_run,
    )
    batch_tokens = job["micro_tokens"] or memory.default_batch_tokens(
        module, run.device, 0, False, contest.MAX_LENGTH
    )
    run.plan = session.Plan(precision, batch_tokens, steps_of_run)
    if layout == "packed":
        checks.check_start(model, None, data, run.device, precision, same_weights=False)
    return model


def _train(planned, data, run, loss, model, report):
    """Seconds and mean loss of each step, and the last step's batches."""
    seconds, means, last = [], [], contest.now(run.device)
    ahead = prefetch.packed(((plan, plan.batches) for plan in planned), data, run.device)
    for plan, batches in ahead:
        step = loop.Step(run, plan, batches)
        mean = 0.0
        for batch in step.batches():
            examples = reward.examples(model(batch, at="last"), batch, of_pairs=True)
            losses = loss(examples)
            model.backward(losses.sum() / step.num_groups)
            report.add(batch, examples, losses)
            mean = mean + losses.detach().sum() / step.num_groups
        report.step(step, model.step())
        seconds.append(contest.now(run.device) - last)
        means.append(float(mean))
        last = contest.now(run.device)
    return seconds, means, batches


def trl(job, micro) -> dict:
    """TRL's RewardTrainer on the same token ids."""
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    tokenizer, data = open_pairs(job)
    groups = [data.group(i) for i in range(len(data))]
    columns = {
        f"{side}_ids": [[*g.prompt, *g.responses[i]] for g in groups]
        for i, side in enumerate(("chosen", "rejected"))
    }
    lm, _ = pretrained.load_score_model(job["model"], torch.float32, needs_head=False)
    heads.draw_head(lm.score.weight, SEED)
    padding.use(tokenizer, lm.config, [data])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    clock = contest.clock(device)
    trainer = RewardTrainer(
        model=lm,
        args=RewardConfig(
            job["folder"], learning_rate=LR, **contest.trainer_options(job, micro, device)
        ),
        train_dataset=Dataset.from_dict(columns),
        processing_class=tokenizer,
        callbacks=[clock],
    )
    trainer.train()
    return {"seconds": clock.seconds, "losses": clock.losses, "peak_gb": meter.peak_memory(device)}


if __name__ == "__main__":
    contenders = {"ours": in_house, "padded": in_house, "trl": trl}
    contest.run(contest.Contest(__file__, __doc__, contenders, open_pairs))
