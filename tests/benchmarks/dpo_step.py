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
What is measured besides, and how: tests/benchmarks/pair_steps.py. The losses of the warm-up and of the
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

from tests.benchmarks import pair_steps
from train.engine import checks, ds_config, loading
from train.losses import composition
from train.methods import preference, preference_report
from train.methods.reference import Live

# The reference workload's, but beta: at its 1.0 the second loss of these few pairs is 0 for all,
# and shows nothing.
LR, BETA = 5e-6, 0.1


def make(job, tokenizer, data, run, layout):
    """The objective and the reporter as launch/train_dpo.py makes them, after its start check."""
    ds, precision = pair_steps.resolved_config(job), job["precision"]
    module, frozen = (
        loading.load_backbone(job["model"], ds, precision, 0, run.device, layout=layout)
        for _ in range(2)
    )
    policy = pair_steps.train_model(TASK, job, module, run)
    reference = Live(frozen, ds_config.resolve_frozen({}, ds))
    if layout == "packed":
        checks.check_start(policy, reference, data, run.device, precision, same_weights=True)
    run.plan = run.plan._replace(same_weights=True)
    loss = composition.choose("sigmoid", BETA, {})
    objective = preference.Objective(
        run, loss, policy, reference, data, max_length=pair_steps.MAX_LENGTH
    )
    flags = SimpleNamespace(beta=BETA, log_every=1, reference="live", report_to=["tensorboard"])
    report = preference_report.open_report(run, flags, objective, None)

    def examples(batch):
        ref_logps = objective.ref_logps(batch)
        scored = objective.score(policy(batch), ref_logps, batch)
        return scored.examples, objective.losses(scored)

    return pair_steps.Training(policy, report, examples, objective.begin, objective.end)


def trl(job, micro, clock):
    """TRL's DPOTrainer on the same token ids."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    tokenizer, data = pair_steps.open_pairs(TASK, job)
    groups = [data.group(i) for i in range(len(data))]
    columns = {
        "prompt_ids": [list(g.prompt) for g in groups],
        "chosen_ids": [list(g.responses[0]) for g in groups],
        "rejected_ids": [list(g.responses[1]) for g in groups],
    }

    class Tokenised(DPOTrainer):
        def _prepare_dataset(self, dataset, *_, **__):
            return dataset  # it holds ids already

    models = [
        transformers.AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
        for _ in range(2)
    ]
    return Tokenised(
        *models,
        args=DPOConfig(job["folder"], beta=BETA, **pair_steps.trainer_options(TASK, job, micro)),
        train_dataset=Dataset.from_dict(columns),
        processing_class=tokenizer,
        callbacks=[clock],
    )


# two models read each pair, and one is trained
TASK = pair_steps.Task(__file__, __doc__, LR, forwards=2, keep_tail=False, make=make, trl=trl)

if __name__ == "__main__":
    pair_steps.run(TASK)
