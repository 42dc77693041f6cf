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
Peak memory is the whole process's: ru_maxrss, nothing deducted, on CPU;
torch.cuda.max_memory_allocated on CUDA. The losses of the warm-up and of the first measured step
must agree between contenders (within 2e-3 in fp32, else the exit status is 1; in bf16 the
differences are only shown).

"useful" FLOP/s counts the packed rows' work (train.models.flops: 4 forwards a step), the same for
all; "own" counts what a layout computes, padding included. Shares are of the best matrix product
measured in the same run over several shapes, in fp32 or bf16 like the step.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import transformers

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from train import quiet
from train.data import steps, tokens
from train.data.packing import pack
from train.engine import checks, dist, ds_config, loading, memory, prefetch, trained
from train.losses import composition
from train.methods import preference, preference_report
from train.methods.reference import Live
from train.models import builtin, pretrained
from train.models.flops import FlopCounter
from train.run import folder, loop, meter, session

# The reference workload's, but beta: at its 1.0 the second loss of these few pairs is 0 for all,
# and shows nothing.
LR, BETA, CLIP, MAX_LENGTH, MAX_PROMPT = 5e-6, 0.1, 1.0, 1024, 256
AGREE = 2e-3  # nats: how far losses of two contenders may lie apart in fp32
# matrix products (m, k, n)
SHAPES = ((1024,) * 3, (2048,) * 3, (4096,) * 3, (2048, 576, 1536), (1536, 576, 49152))


# In a process of its own: one contender's turn.


def child(job: dict) -> dict:
    """Run one contender; what it measured."""
    kind, _, micro = job["contender"].partition("/")
    found = {"machine": machine, "trl": trl}.get(kind, in_house)(job, int(micro or 0))
    return found | {"threads": torch.get_num_threads()}


def _now(device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def open_pairs(job):
    """The tokenizer and the first pairs that survive tokenisation, through the training code's own
    cache.
    """
    tokenizer = pretrained.load_tokenizer(job["model"])
    options = dict(max_length=MAX_LENGTH, max_prompt_length=MAX_PROMPT, max_dropped=1.0)
    data = tokens.prepare([job["data"]], tokenizer, **options)
    if len(data) < job["pairs"]:
        raise ValueError(
            f"{job['data']} has {len(data)} usable pairs, fewer than --pairs {job['pairs']}"
        )
    return tokenizer, data.select(range(job["pairs"]))


def machine(job, _) -> dict:
    """The best matrix product, in FLOP/s, and its shape; the pairs' sizes in tokens. Fills the
    token cache.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype, best = {"fp32": torch.float32, "bf16": torch.bfloat16}[job["precision"]], (0.0, None)
    for m, k, n in SHAPES + ((8192,) * 3,) * (device.type == "cuda"):
        a, b = (torch.randn(*shape, device=device, dtype=dtype) for shape in ((m, k), (n, k)))
        for _ in range(5):
            started = _now(device)
            a @ b.t()
            best = max(best, (2 * m * k * n / (_now(device) - started), f"{m} x {k} x {n}"))
    prompts, chosen, rejected = (int(column.sum()) for column in open_pairs(job)[1].lengths.T)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    return {
        "peak": best[0],
        "peak_shape": best[1],
        "packed_tokens": prompts + chosen + rejected,
        "two_sided_tokens": 2 * prompts + chosen + rejected,
        "device": name,
    }


def in_house(job, micro) -> dict:
    """The loop of launch/train_dpo.py: packed batches, or with `micro` padded ones of that many
    pairs.
    """
    quiet.silence_libraries()
    device = dist.init()
    _, data = open_pairs(job)
    run = session.Run(folder.RunFolder(job["folder"], {}), device)
    objective, report = _open_models(job, data, run, "padded" if micro else "packed")
    planned = _planned_steps(job, micro, data, run.plan.batch_tokens)
    seconds, losses, batches = _train(planned, data, run, objective, report)
    useful, own = _operations(objective.policy.module, data, batches, bool(micro))
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
    ds = ds_config.resolve(ds_config.read_config(ROOT / "ds_configs/zero0.json"), precision, CLIP)
    module, frozen = (
        loading.load_backbone(job["model"], ds, precision, 0, run.device, layout=layout)
        for _ in range(2)
    )
    policy = trained.TrainedModel(
        module,
        ds,
        lr=LR,
        weight_decay=0.0,
        grad_clip=CLIP,
        scheduler="constant",
        warmup_ratio=0.0,
        total_steps=steps_of_run,
    )
    reference = Live(frozen, ds_config.resolve_frozen({}, ds))
    batch_tokens = job["micro_tokens"] or memory.default_batch_tokens(
        module, run.device, 0, False, MAX_LENGTH
    )
    run.plan = session.Plan(precision, batch_tokens, steps_of_run, same_weights=True)
    if layout == "packed":
        checks.check_start(policy, reference, data, run.device, precision, same_weights=True)
    loss = composition.choose("sigmoid", BETA, {})
    objective = preference.Objective(run, loss, policy, reference, data, max_length=MAX_LENGTH)
    flags = SimpleNamespace(beta=BETA, log_every=1, reference="live")
    report = preference_report.open_report(run, flags, objective, None)
    report.start()
    return objective, report


def _planned_steps(job, micro, data, batch_tokens):
    if not micro:
        return steps.plan_steps(
            data.lengths.sum(1), job["pairs"], batch_tokens, seed=0, total=1 + job["steps"]
        )
    groups = tuple(range(job["pairs"]))
    batches = tuple(groups[i : i + micro] for i in groups[::micro])
    return [
        steps.PlannedStep(number, number, groups, batches) for number in range(1 + job["steps"])
    ]


def _train(planned, data, run, objective, report):
    """Seconds and mean loss of each step, and the last step's batches."""
    policy, seconds, means, last = objective.policy, [], [], _now(run.device)
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
        seconds.append(_now(run.device) - last)
        means.append(float(mean))
        last = _now(run.device)
    return seconds, means, batches


def _operations(module, data, rows, padded):
    """FLOPs of a step: useful (prompts once, no padding), and own (as this layout computes them)."""
    counter = FlopCounter(module)
    if padded:
        sizes = [
            [prompt + n for prompt, *responses in row.shape for n in responses] for row in rows
        ]
        flat = [torch.empty(len(each) * max(each), device="meta") for each in sizes]
        rows = [
            SimpleNamespace(input_ids=x, target=x, shape=[(0, max(each))] * len(each))
            for x, each in zip(flat, sizes, strict=True)
        ]
    useful = counter.forward(pack([data.group(i) for i in range(len(data))]))
    return 4 * useful, 4 * sum(counter.forward(row) for row in rows)


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
        job["folder"],
        max_steps=1 + job["steps"],
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=job["pairs"] // micro,
        learning_rate=LR,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=CLIP,
        beta=BETA,
        max_length=MAX_LENGTH,
        bf16=job["precision"] == "bf16",
        use_cpu=device.type == "cpu",
        gradient_checkpointing=job["trl_checkpointing"],
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
    )

    class Tokenised(DPOTrainer):
        def _prepare_dataset(self, dataset, *_, **__):
            return dataset  # it holds ids already

    class Clock(transformers.TrainerCallback):
        seconds, losses = [], []

        def on_step_begin(self, *_, **__):
            self.began = _now(device)

        def on_step_end(self, *_, **__):
            self.seconds.append(_now(device) - self.began)

        def on_log(self, *_, logs, **__):
            self.losses += [float(logs["loss"])] if "loss" in logs else []

    clock = Clock()
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


# In the first process, which loads no model: a child's ru_maxrss begins at its parent's.


def main():
    args = arguments()
    if args.model is None:
        args.model = str(builtin.fetch(say=lambda line: print(line, file=sys.stderr)))
    micros = {
        "ours": [],
        "padded": sorted({min(m, args.pairs) for m in args.padded_micro}),
        "trl": args.trl_micro,
    }
    names = [
        name
        for kind in args.contenders
        for name in ([f"{kind}/{m}" for m in micros[kind]] or [kind])
    ]
    runs = []
    for number in range(args.rounds):
        first = number % len(names)
        for precision in args.precision:
            for name in ("machine", *names[first:], *names[:first]):
                runs.append(
                    {"contender": name, "precision": precision, "round": number}
                    | spawn(args, name, precision)
                )
                print(f"round {number + 1}: {_short(runs[-1])}", file=sys.stderr, flush=True)
                if name == "machine" and "failed" in runs[-1]:
                    sys.exit(1)
                if args.json:
                    Path(args.json).write_text(
                        json.dumps({"arguments": vars(args), "runs": runs}, indent=1)
                    )
    lines, agreed = agreement(args, names, runs)
    print("\n".join([*header(args, runs), *table(args, names, runs), "", *lines]))
    sys.exit(0 if agreed else 1)


def arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", help="a model directory; default: the built-in model")
    add("--data", required=True, help="a jsonl file of pairs")
    add("--pairs", type=int, default=4, help="pairs a step (default 4)")
    add("--rounds", type=int, default=3, help="turns of every contender (default 3)")
    add(
        "--steps",
        type=int,
        default=1,
        help="measured steps a turn, after one to warm up (default 1)",
    )
    add("--precision", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    add(
        "--contenders",
        nargs="+",
        choices=("ours", "padded", "trl"),
        default=["ours", "padded", "trl"],
    )
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
    add(
        "--trl-checkpointing", action="store_true", help="TRL: its default activation checkpointing"
    )
    add("--threads", type=int, help="CPU threads of each process; default: torch's own choice")
    add("--json", help="file for everything measured, written as it comes")
    args = parser.parse_args()
    if args.steps < 1 or args.rounds < 1:
        parser.error("at least one round of one measured step")
    if uneven := [m for m in args.trl_micro if args.pairs % m]:
        parser.error(f"--trl-micro {uneven[0]} does not divide --pairs {args.pairs}")
    return args


def spawn(args, name, precision) -> dict:
    """A contender's turn in a process of its own; {"failed": why} where it did not end well."""
    env = {"CUDA_VISIBLE_DEVICES": "0", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"} | os.environ
    if args.threads:
        env["OMP_NUM_THREADS"] = str(args.threads)
    with tempfile.TemporaryDirectory(prefix="dpo_step-") as work:
        job = vars(args) | {
            "contender": name,
            "precision": precision,
            "folder": f"{work}/run",
            "out": f"{work}/out",
        }
        load, command = os.getloadavg()[0], [sys.executable, __file__, json.dumps(job)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, errors="replace")
        if done.returncode:
            why = (
                signal.Signals(-done.returncode).name
                if done.returncode < 0
                else done.stderr.strip()[-2000:]
            )
            return {"failed": why, "load_before": load}
        return json.loads(Path(job["out"]).read_text()) | {"load_before": load}


def _short(run) -> str:
    what = f"{run['contender']} {run['precision']}: "
    if "failed" in run or "peak" in run:
        return what + (
            f"failed: {run['failed']}" if "failed" in run else f"{run['peak'] / 1e9:,.0f} GFLOP/s"
        )
    steps = ", ".join(f"{seconds:.3f} s" for seconds in run["seconds"])
    return (
        what
        + f"{steps} (the first warms up), {run['peak_gb']:.2f} GB, load {run['load_before']:.1f} before"
    )


def sound(runs, name, precision):
    return [
        r
        for r in runs
        if r["contender"] == name and r["precision"] == precision and "failed" not in r
    ]


def header(args, runs) -> list[str]:
    one = next(r for r in runs if r["contender"] == "machine")
    threads = "/".join(str(n) for n in sorted({r["threads"] for r in runs if "threads" in r}))
    lines = [
        f"{Path(args.model).name}, the first {args.pairs} pairs of {Path(args.data).name} "
        f"({one['two_sided_tokens']:,} tokens two-sided, {one['packed_tokens']:,} packed and shared), "
        f"{one['device']} with {threads} threads, torch {torch.__version__}, {args.rounds} rounds."
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
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for precision in args.precision:
        peak = max(r["peak"] for r in sound(runs, "machine", precision))
        ours = [s for r in sound(runs, "ours", precision) for s in r["seconds"][1:]]
        useful = next((r["useful_flops"] for r in runs if "useful_flops" in r), None)
        for name in names:
            mine = sound(runs, name, precision)
            if not mine:
                lines.append(f"| {name} | {precision} | failed |" + " |" * (len(columns) - 3))
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
            cells = (
                name,
                precision,
                spread,
                f"{args.pairs / middle:.3f}",
                ratio,
                memory_gb,
                *losses,
                *rates,
            )
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def agreement(args, names, runs) -> tuple[list[str], bool]:
    """How far the first two steps' losses lie apart over all contenders and rounds, and whether
    that is near enough.
    """
    lines, agreed = [], not any("failed" in r for r in runs)
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


if __name__ == "__main__":
    if sys.argv[-1].startswith("{"):
        task = json.loads(sys.argv[-1])
        Path(task["out"]).write_text(json.dumps(child(task)))
    else:
        main()
