"""What one whole step of GRPO costs, ours against TRL's GRPOTrainer: seconds, peak memory and the share
of time that goes into sampling, on the same prompts, samples and lengths.

    python tests/benchmarks/policy_step.py
    python tests/benchmarks/policy_step.py --prompts 16 --trl-micro 8 16 32 --json OUT.json

(TRL comes with the extra: pip install -e '.[peers]'.) A step samples answers to a few prompts, rewards
them, scores them under the reference (ours under the policy too), and makes one update: forward,
backward, clipping, AdamW. Contenders, which take turns in processes of their own:

    ours      launch/train_ppo.py with --algorithm grpo, as a user runs it, measures and TensorBoard
              included
    trl/m     TRL's GRPOTrainer with loss_type grpo and our coefficients, micro-batches of m samples; no
              activation checkpointing (faster without; --trl-checkpointing puts its default back), no
              reports, no checkpoints

TRL's model draws the very tokens that ours drew: its `generate` samples as ever, from logits in which
the token to be drawn outweighs the rest (tests/benchmarks/replay.py), so ours has the first turn. One
step warms up, then --steps are measured; loading is not timed. Ours is timed from a rollout's
beginning to the end of its report, TRL from on_step_begin to on_step_end. Both train fp32 weights; bf16
is autocast over them. Gradient norms of the first two steps must agree (within 1e-3 of themselves in
fp32, else the exit status is 1; in bf16 they are only shown).
"""

import json
import statistics
import sys
from pathlib import Path

import torch
import transformers

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.benchmarks import contest, replay
from train.losses.algorithms import ALGORITHMS
from train.models import pretrained
from train.run import meter

GRPO = ALGORITHMS["grpo"]
LR, CLIP = 1e-6, 1.0
AGREE = 1e-3  # how far gradient norms may lie apart, as a share of themselves, in fp32


def reward(completions, **_):
    """Distinct letters of the answers: seldom the same for a whole group."""
    return [float(100 * len({*turns[0]["content"]})) for turns in completions]


def ours(job, _) -> dict:
    """The user's command; its rollouts are kept for the others."""
    from launch import train_ppo
    from train.run import loop

    count = 1 + job["steps"]
    texts = replay.read_prompts(job, job["prompts"] * count)
    data = Path(job["shared"]) / "prompts.jsonl"
    rows = [{"prompt": [{"role": "user", "content": text}]} for text in texts]  # as TRL gets them
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = {"seconds": [], "generating": [], "norms": []}
    kept, rollouts = [], loop.rollouts

    def measured(run, settings, data, state, report):
        began, show = [0.0], report.step

        def step_and_note(step, updates):
            show(step, updates)
            found["seconds"].append(contest.now(run.device) - began[0])
            found["generating"].append(report.last["perf/seconds_generate"])
            found["norms"].append(report.last["train/grad_norm"])
            found["peak_gb"] = meter.peak_memory(run.device)
            answers = state["rollout"].rollout.answers
            kept.append(
                {
                    "rows": [int(data.rows[group]) for group in answers.groups],
                    "prompts": answers.prompts,
                    "answers": [(list(c.ids), c.ended) for c in answers.completions],
                }
            )

        report.step = step_and_note
        for step in rollouts(run, settings, data, state, report):
            began[0] = contest.now(run.device)
            yield step

    loop.rollouts = measured
    flags = {
        "model": job["model"],
        "data": data,
        "output": job["folder"],
        "algorithm": "grpo",
        "reward": "tests.benchmarks.policy_step:reward",
        "precision": job["precision"],
        "batch_size": job["prompts"],
        "samples_per_prompt": job["samples"],
        "max_new_tokens": job["max_new_tokens"],
        "max_steps": count,
        "epochs": 2,
        "lr": LR,
        "lr_scheduler": "constant",
        "warmup_ratio": 0.0,
        "weight_decay": 0.0,
        "grad_clip": CLIP,
        "save_minutes": 0,
    }
    sys.argv += [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    train_ppo.main()
    replay.file(job).write_text(json.dumps(kept))
    return finish(job, found)


def trl(job, micro) -> dict:
    """TRL's GRPOTrainer."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    device, k = contest.default_device(), job["samples"]
    steps = json.loads(replay.file(job).read_text())
    texts = replay.read_prompts(job, job["prompts"] * len(steps))
    lm = transformers.AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    answers_of = {
        tuple(prompt): [ids for ids, _ in step["answers"][i * k : (i + 1) * k]]
        for step in steps
        for i, prompt in enumerate(step["prompts"])
    }
    generating = replay.draws_again(lm, answers_of)
    clock = contest.clock(device)
    trainer = GRPOTrainer(
        model=lm,
        reward_funcs=reward,
        args=GRPOConfig(
            job["folder"],
            **contest.trainer_options(job, device),
            learning_rate=LR,
            max_grad_norm=CLIP,
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=job["prompts"] * k // micro,
            num_generations=k,
            max_completion_length=job["max_new_tokens"],
            loss_type="grpo",
            beta=GRPO.kl.coef,
            epsilon=GRPO.clip_low,
            shuffle_dataset=False,
        ),
        train_dataset=Dataset.from_list(
            [
                {"prompt": [{"role": "user", "content": texts[row]}]}
                for step in steps
                for row in step["rows"]
            ]
        ),
        processing_class=pretrained.load_tokenizer(job["model"]),
        callbacks=[clock],
    )
    trainer.train()
    found = {"seconds": clock.seconds, "generating": generating, "norms": clock.logged("grad_norm")}
    return finish(job, found | {"peak_gb": meter.peak_memory(device)})


def finish(job, found) -> dict:
    """What was measured, with the lengths of the last step's answers."""
    lengths = replay.lengths(json.loads(replay.file(job).read_text())[-1]["answers"])
    said = contest.steps_said(found["seconds"], found["peak_gb"])
    share = found["generating"][-1] / found["seconds"][-1]
    return lengths | found | {"said": f"{said}, {share:.0%} of the last step sampling"}


def add_arguments(parser):
    replay.add_arguments(parser)
    contest.add_steps(parser)
    add = parser.add_argument
    add("--prompts", type=int, default=8, help="distinct prompts a step (default 8)")
    add(
        "--trl-micro",
        type=int,
        nargs="+",
        default=[8],
        help="TRL: samples a micro-batch; divides a step's (default 8, its own)",
    )


def check(args) -> str | None:
    """What is wrong with the arguments."""
    if args.steps < 1:
        return "at least one measured step"
    if uneven := [m for m in args.trl_micro if args.prompts * args.samples % m]:
        return f"--trl-micro {uneven[0]} does not divide {args.prompts * args.samples} samples"


def report(args, names, runs):
    """The table, and whether gradient norms agree."""
    lines = [replay.header(args, runs)]
    columns = ("contender", "precision", "s/step: median (min-max)", "ours is faster by", "of it sampling",
               "peak GB", "gradient norm 1", "gradient norm 2")  # fmt: skip
    rows, verdicts, agreed = [], [], True
    for precision in args.precision:
        drawn = contest.sound(runs, "ours", precision)[0]
        lines.append(
            f"{precision}: {drawn['ended']:.1%} of the last step's answers ended by themselves; "
            f"{drawn['tokens']:,} tokens, lengths {drawn['quartiles']} (minimum, quartiles, maximum)."
        )
        times = [s for r in contest.sound(runs, "ours", precision) for s in r["seconds"][1:]]
        apart = 0.0
        for name in names:
            mine = contest.sound(runs, name, precision)
            if not mine:
                rows.append((name, precision, "failed", *[""] * (len(columns) - 3)))
                continue
            seconds = [s for r in mine for s in r["seconds"][1:]]
            sampling = [s for r in mine for s in r["generating"][1:]]
            middle = statistics.median(seconds)
            norms = mine[0]["norms"][:2]
            apart = max(
                apart, *(abs(a / b - 1) for a, b in zip(norms, drawn["norms"][:2], strict=True))
            )
            rows.append(
                (
                    name,
                    precision,
                    f"{middle:.2f} ({min(seconds):.2f}-{max(seconds):.2f})",
                    f"{middle / statistics.median(times):.2f}x",
                    f"{sum(sampling) / sum(seconds):.0%}",
                    f"{max(r['peak_gb'] for r in mine):.2f}",
                    *(f"{norm:.5f}" for norm in norms),
                )
            )
        near = apart <= AGREE
        agreed &= near or precision != "fp32"
        said = f"{'agree' if near else 'DISAGREE'}, bound {AGREE:g}"
        verdicts.append(
            f"Gradient norms 1 and 2, {precision}: at most {apart:.1e} of themselves apart "
            f"({said if precision == 'fp32' else 'shown only'})."
        )
    return [*lines, "", *contest.markdown(columns, rows), "", *verdicts], agreed


if __name__ == "__main__":
    contest.run(
        contest.Contest(
            script=__file__,
            doc=__doc__,
            contenders={"ours": ours, "trl": trl},
            add_arguments=add_arguments,
            check=check,
            names=lambda args: ["ours", *(f"trl/{m}" for m in args.trl_micro)],
            report=report,
            first=("ours",),
        )
    )
