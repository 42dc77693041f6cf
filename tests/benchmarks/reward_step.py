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
What is measured besides, and how: tests/benchmarks/pair_steps.py. The losses of the warm-up and of the
first measured step must agree between contenders (within 2e-3 in fp32, else the exit status is 1; in
bf16 the differences are only shown).
"""

import sys
from pathlib import Path
from types import SimpleNamespace

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.benchmarks import pair_steps
from train.data import padding
from train.engine import checks, loading
from train.losses import reward as losses_of_rewards
from train.methods import reward, reward_report
from train.models import heads, pretrained

LR, SEED = 1e-5, 0  # the default run's rate; of the head


def make(job, tokenizer, data, run, layout):
    """The model and the reporter as launch/train_reward.py makes them, after its start check."""
    ds, precision = pair_steps.resolved_config(job), job["precision"]
    module = loading.load_score_model(
        job["model"], ds, precision, 0, run.device, layout=layout, seed=SEED
    )
    padding.use(tokenizer, module.lm.config, [data])
    model = pair_steps.train_model(TASK, job, module, run)
    if layout == "packed":
        checks.check_start(model, None, data, run.device, precision, same_weights=False)
    loss = losses_of_rewards.choose("bradley_terry", {})
    flags = SimpleNamespace(log_every=1, report_to=["tensorboard"])
    report = reward_report.open_report(run, flags, loss, model, data, None)

    def examples(batch):
        found = reward.examples(model(batch, at="last"), batch, of_pairs=True)
        return found, loss(found)

    return pair_steps.Training(model, report, examples)


def trl(job, micro, clock):
    """TRL's RewardTrainer on the same token ids."""
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    tokenizer, data = pair_steps.open_pairs(TASK, job)
    groups = [data.group(i) for i in range(len(data))]
    columns = {
        f"{side}_ids": [[*g.prompt, *g.responses[i]] for g in groups]
        for i, side in enumerate(("chosen", "rejected"))
    }
    lm, _ = pretrained.load_score_model(job["model"], torch.float32, needs_head=False)
    heads.draw_head(lm.score.weight, SEED)
    padding.use(tokenizer, lm.config, [data])
    return RewardTrainer(
        model=lm,
        args=RewardConfig(job["folder"], **pair_steps.trainer_options(TASK, job, micro)),
        train_dataset=Dataset.from_dict(columns),
        processing_class=tokenizer,
        callbacks=[clock],
    )


TASK = pair_steps.Task(__file__, __doc__, LR, forwards=1, keep_tail=True, make=make, trl=trl)

if __name__ == "__main__":
    pair_steps.run(TASK)
