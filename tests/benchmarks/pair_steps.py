"""What the benchmarks of a training step on pairs share: the loop of a launch script as a contender, what
TRL's trainer is given, and the table.

"useful" FLOP/s counts the packed rows' work (train.models.flops), the same for all; "own" counts what
a layout computes, padding included. Shares are of the best matrix product measured in the same run
over several shapes, in fp32 or bf16 like the step.
"""

import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch

from tests.benchmarks import contest
from tests.benchmarks.contest import sound
from train import quiet
from train.data import steps, tokens
from train.data.packing import pack
from train.engine import dist, ds_config, memory, prefetch, trained
from train.models import pretrained
from train.models.flops import FlopCounter
from train.models.matmul import matmul_transposed
from train.run import folder, loop, meter, session

ROOT = Path(__file__).resolve().parents[2]
CLIP, MAX_LENGTH, MAX_PROMPT = 1.0, 1024, 256  # the reference workload's
AGREE = 2e-3  # nats: how far losses of two contenders may lie apart in fp32
# matrix products (m, k, n)
SHAPES = ((1024,) * 3, (2048,) * 3, (4096,) * 3, (2048, 576, 1536), (1536, 576, 49152))


class Task(NamedTuple):
    """What a launch script trains, for `run`."""

    script: str  # the benchmark's file
    doc: str  # for --help
    lr: float
    forwards: int  # forward passes of a step: the reference's count
    keep_tail: bool  # of answers, see data/tokens.py
    make: Callable  # (job, tokenizer, data, run, layout) -> Training
    trl: Callable  # (job, pairs of a micro-batch, clock) -> TRL's trainer


class Training(NamedTuple):
    """What a script's loop works with."""

    model: trained.TrainedModel
    report: object
    examples: Callable  # a batch -> (what the report takes of it, (B,) losses)
    begin: Callable = lambda step: None
    end: Callable = lambda step, update: None


def run(task: Task):
    """The benchmark of a task."""
    ours, trl = partial(in_house, task), partial(theirs, task)
    contest.run(
        contest.Contest(
            script=task.script,
            doc=task.doc,
            contenders={
                "machine": partial(machine, task),
                "ours": ours,
                "padded": ours,
                "trl": trl,
            },
            add_arguments=add_arguments,
            check=check,
            names=names,
            report=report,
            first=("machine",),
        )
    )


# In a process of its own: what one contender's turn needs.


def open_pairs(task: Task, job):
    """The tokenizer and the first pairs that survive tokenisation, as the script reads them, through
    its own cache.
    """
    tokenizer = pretrained.load_tokenizer(job["model"])
    data = tokens.prepare(
        [job["data"]],
        tokenizer,
        max_length=MAX_LENGTH,
        max_prompt_length=MAX_PROMPT,
        max_dropped=1.0,
        keep_tail=task.keep_tail,
    )
    if len(data) < job["pairs"]:
        raise ValueError(
            f"{job['data']} has {len(data)} usable pairs, fewer than --pairs {job['pairs']}"
        )
    return tokenizer, data.select(range(job["pairs"]))


def in_house(task: Task, job, micro) -> dict:
    """The loop of the launch script: packed batches, or with `micro` padded ones of that many pairs."""
    quiet.silence_libraries()
    device = dist.init()
    tokenizer, data = open_pairs(task, job)
    of_run = session.Run(folder.RunFolder(job["folder"], {}), device)
    training = task.make(job, tokenizer, data, of_run, "padded" if micro else "packed")
    training.report.start()
    planned = planned_steps(job, micro, data, of_run.plan.batch_tokens)
    seconds, losses, batches = _train(planned, data, of_run, training)
    useful, own = operations(training.model.module, data, batches, bool(micro), task.forwards)
    training.report.close()
    dist.shutdown()
    return _measured(device, seconds, losses) | {
        "useful_flops": useful,
        "own_flops": own,
        "rows": [batch.input_ids.shape[0] for batch in batches],
        "budget": of_run.plan.batch_tokens,
    }


def resolved_config(job) -> dict:
    """DeepSpeed's configuration: stage 0."""
    read = ds_config.read_config(ROOT / "ds_configs/zero0.json")
    return ds_config.resolve(read, job["precision"], CLIP)


def train_model(task: Task, job, module, run) -> trained.TrainedModel:
    """`module` under DeepSpeed; settles the plan."""
    total = 1 + job["steps"]
    model = trained.TrainedModel(
        module,
        resolved_config(job),
        lr=task.lr,
        weight_decay=0.0,
        grad_clip=CLIP,
        scheduler="constant",
        warmup_ratio=0.0,
        total_steps=total,
    )
    batch_tokens = job["micro_tokens"] or memory.default_batch_tokens(
        module, run.device, 0, False, MAX_LENGTH
    )
    run.plan = session.Plan(job["precision"], batch_tokens, total)
    return model


def _train(planned, data, run, training: Training):
    """Seconds and mean loss of each step, and the last step's batches."""
    seconds, means, last = [], [], contest.now(run.device)
    ahead = prefetch.packed(((plan, plan.batches) for plan in planned), data, run.device)
    for plan, batches in ahead:
        step = loop.Step(run, plan, batches, before_update=lambda: None)
        mean = 0.0
        training.begin(step)
        for batch in step.batches():
            examples, losses = training.examples(batch)
            training.model.backward(losses.sum() / step.num_groups)
            training.report.add(batch, examples, losses)
            mean = mean + losses.detach().sum() / step.num_groups
        update = training.model.step()
        training.end(step, update)
        training.report.end_step(step)
        training.report.step(step, update)
        seconds.append(contest.now(run.device) - last)
        means.append(float(mean))
        last = contest.now(run.device)
    return seconds, means, batches


def _measured(device, seconds, losses) -> dict:
    peak_gb = meter.peak_memory(device)
    said = contest.steps_said(seconds, peak_gb)
    return {"seconds": seconds, "losses": losses, "peak_gb": peak_gb, "said": said}


def theirs(task: Task, job, micro) -> dict:
    """TRL's trainer on the same pairs."""
    device = contest.default_device()
    clock = contest.clock(device)
    task.trl(job, micro, clock).train()
    return _measured(device, clock.seconds, clock.logged("loss"))


def trainer_options(task: Task, job, micro) -> dict:
    """The arguments of a TRL trainer of pairs."""
    return contest.trainer_options(job, contest.default_device()) | dict(
        learning_rate=task.lr,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=job["pairs"] // micro,
        max_grad_norm=CLIP,
        max_length=MAX_LENGTH,
    )


def machine(task: Task, job, _) -> dict:
    """The best matrix product, in FLOP/s, and its shape; the pairs' sizes in tokens. Fills the
    token cache.
    """
    device = contest.default_device()
    dtype, best = {"fp32": torch.float32, "bf16": torch.bfloat16}[job["precision"]], (0.0, None)
    for m, k, n in SHAPES + ((8192,) * 3,) * (device.type == "cuda"):
        a, b = (torch.randn(*shape, device=device, dtype=dtype) for shape in ((m, k), (n, k)))
        # by each library that a step uses
        for product in (lambda: a @ b.t(), lambda: matmul_transposed(a, b)):  # noqa: B023
            for _ in range(5):
                started = contest.now(device)
                product()
                seconds = contest.now(device) - started
                best = max(best, (2 * m * k * n / seconds, f"{m} x {k} x {n}"))
    prompts, chosen, rejected = (int(column.sum()) for column in open_pairs(task, job)[1].lengths.T)
    return {
        "peak": best[0],
        "peak_shape": best[1],
        "packed_tokens": prompts + chosen + rejected,
        "two_sided_tokens": 2 * prompts + chosen + rejected,
        "device": contest.device_name(),
        "said": f"{best[0] / 1e9:,.0f} GFLOP/s",
    }


def planned_steps(job, micro, data, batch_tokens):
    if not micro:
        return steps.plan_steps(
            data.lengths.sum(1), job["pairs"], batch_tokens, seed=0, total=1 + job["steps"]
        )
    groups = tuple(range(job["pairs"]))
    batches = tuple(groups[i : i + micro] for i in groups[::micro])
    return [
        steps.PlannedStep(number, number, groups, batches) for number in range(1 + job["steps"])
    ]


def operations(module, data, rows, padded, forwards):
    """FLOPs of a step: useful (prompts once, no padding), and own (as this layout computes them).
    forwards: forward passes of a step, beside its backward pass.
    """
    counter = FlopCounter(module)
    if padded:
        sizes = [
            [prompt + n for prompt, *responses in row.shape for n in responses] for row in rows
        ]
        flat = [torch.empty(len(each) * max(each), device="meta") for each in sizes]
        rows = [
            SimpleNamespace(
                input_ids=x, target=x, shape=[(0, max(each))] * len(each), num_responses=len(each)
            )
            for x, each in zip(flat, sizes, strict=True)
        ]

    def of_step(batch):
        return forwards * counter.forward(batch) + counter.backward(batch)

    useful = of_step(pack([data.group(i) for i in range(len(data))]))
    return useful, sum(of_step(row) for row in rows)


# In the first process.


def add_arguments(parser):
    add = parser.add_argument
    add("--data", required=True, help="a jsonl file of pairs")
    add("--pairs", type=int, default=4, help="pairs a step (default 4)")
    contest.add_steps(parser)
    kinds = ("ours", "padded", "trl")
    add("--contenders", nargs="+", choices=kinds, default=list(kinds))
    add(
        "--micro-tokens",
        type=int,
        help="ours: tokens a packed row may hold; default: from free memory",
    )
    add(
        "--padded-micro",
        type=int,
        nargs="+",
        default=[1, 2, 4],
        help="padded: pairs a micro-batch (default 1 2 4)",
    )
    add(
        "--trl-micro",
        type=int,
        nargs="+",
        default=[1],
        help="TRL: pairs a micro-batch; divides --pairs (default 1)",
    )


def check(args) -> str | None:
    """What is wrong with the arguments."""
    if args.steps < 1:
        return "at least one measured step"
    if uneven := [m for m in args.trl_micro if args.pairs % m]:
        return f"--trl-micro {uneven[0]} does not divide --pairs {args.pairs}"


def names(args) -> list[str]:
    """Contenders by name, with the pairs of a micro-batch."""
    micros = {
        "ours": [],
        "padded": sorted({min(m, args.pairs) for m in args.padded_micro}),
        "trl": args.trl_micro,
    }
    return [
        name
        for kind in args.contenders
        for name in ([f"{kind}/{m}" for m in micros[kind]] or [kind])
    ]


def report(args, names, runs) -> tuple[list[str], bool]:
    """The table with what is above and below it, and whether losses agree."""
    lines, agreed = agreement(args, names, runs)
    return [*header(args, runs), *table(args, names, runs), "", *lines], agreed


def header(args, runs) -> list[str]:
    one = next(r for r in runs if r["contender"] == "machine")
    lines = [
        f"{Path(args.model).name}, the first {args.pairs} pairs of {Path(args.data).name} "
        f"({one['two_sided_tokens']:,} tokens two-sided, {one['packed_tokens']:,} packed and shared), "
        f"{one['device']} with {contest.threads(runs)} threads, torch {torch.__version__}, {args.rounds} rounds."
    ]
    for precision in args.precision:
        best, shape = max((r["peak"], r["peak_shape"]) for r in sound(runs, "machine", precision))
        lines.append(
            f"Best matrix product of this run, {precision}: {best / 1e9:,.0f} GFLOP/s ({shape})."
        )
    return [*lines, ""]


def table(args, names, runs) -> list[str]:
    """The Markdown table, a row a contender and precision."""
    columns = (
        "contender",
        "precision",
        "s/step: median (min-max)",
        "pairs/s",
        "ours is faster by",
        "peak GB",
        "loss 1",
        "loss 2",
        "useful GFLOP/s (of peak)",
        "own GFLOP/s (of peak)",
    )
    rows = []
    for precision in args.precision:
        peak = max(r["peak"] for r in sound(runs, "machine", precision))
        ours = [s for r in sound(runs, "ours", precision) for s in r["seconds"][1:]]
        useful = next((r["useful_flops"] for r in runs if "useful_flops" in r), None)
        for name in names:
            mine = sound(runs, name, precision)
            if not mine:
                rows.append((name, precision, "failed", *[""] * (len(columns) - 3)))
                continue
            seconds = [s for r in mine for s in r["seconds"][1:]]
            middle, losses = (
                statistics.median(seconds),
                (f"{loss:.4f}" for loss in mine[0]["losses"][:2]),
            )
            ratio = f"{middle / statistics.median(ours):.2f}x" if ours else ""
            spread = f"{middle:.3f} ({min(seconds):.3f}-{max(seconds):.3f})"
            work = (useful, mine[0].get("own_flops"))
            rates = (
                f"{n / middle / 1e9:,.0f} ({n / middle / peak:.0%})" if n else "" for n in work
            )
            memory_gb = f"{max(r['peak_gb'] for r in mine):.2f}"
            of_time = (spread, f"{args.pairs / middle:.3f}", ratio)
            rows.append((name, precision, *of_time, memory_gb, *losses, *rates))
    return contest.markdown(columns, rows)


def agreement(args, names, runs) -> tuple[list[str], bool]:
    """How far the first two steps' losses lie apart over all contenders and rounds, and whether
    that is near enough.
    """
    lines, agreed = [], True
    for precision in args.precision:
        if not (
            losses := [r["losses"][:2] for name in names for r in sound(runs, name, precision)]
        ):
            continue
        apart = [max(column) - min(column) for column in zip(*losses, strict=True)]
        near = max(apart) <= AGREE
        agreed &= near or precision != "fp32"
        verdict = (
            f"{'agree' if near else 'DISAGREE'}, bound {AGREE:g}"
            if precision == "fp32"
            else "shown only"
        )
        lines.append(
            f"Losses 1 and 2, {precision}: at most {apart[0]:.1e} and {apart[1]:.1e} apart ({verdict})."
        )
    return lines, agreed
