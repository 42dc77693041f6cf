"""Tokens a second of sampled answers: train/models/generate.py against transformers' plain `generate` on
the same prompts, the same samples and so the same lengths.

    python tests/benchmarks/rollout.py
    python tests/benchmarks/rollout.py --max-new-tokens 192 --rounds 1 --json OUT.json

Contenders, which take turns in processes of their own:

    ours      the policy as it is trained, decoded as a rollout does: each prompt is read once for its
              samples, finished answers leave, all samples at once; bf16 is autocast over fp32 weights
    plain     transformers' generate with its defaults, all samples in one batch, prompts padded on the
              left; bf16 are weights in bf16, which is faster than autocast

Ours draws at temperature 1 from the full softmax; plain draws the very same tokens: it samples as
ever, from logits in which the token to be drawn outweighs the rest (tests/benchmarks/replay.py). A few
tokens warm up. Tokens count up to an answer's end, the end token included. How many answers ended by
themselves is in the first line: --max-new-tokens has to let most of them.
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
from train import quiet
from train.engine import dist, ds_config, loading
from train.methods.policy_setup import ends_of
from train.models import pretrained
from train.models.generate import generate
from train.run import meter

WARM_UP = 4  # tokens


def open_prompts(job):
    """The tokenizer, and the prompts' token ids."""
    tokenizer = pretrained.load_tokenizer(job["model"])
    prompts = replay.read_prompts(job, job["prompts"])
    messages = [[{"role": "user", "content": prompt}] for prompt in prompts]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    return tokenizer, ids


def ours(job, _) -> dict:
    """Samples of the policy's own; the others draw them again."""
    quiet.silence_libraries()
    device = dist.init()
    tokenizer, prompts = open_prompts(job)
    config = ds_config.resolve({}, job["precision"], 1.0)
    module = loading.load_backbone(job["model"], config, job["precision"], 0, device)
    ends = ends_of(tokenizer, module.lm)

    def sample(max_new_tokens):
        return generate(
            module.lm,
            prompts,
            eos_token_ids=ends,
            max_new_tokens=max_new_tokens,
            samples_per_prompt=job["samples"],
            batch_size=len(prompts) * job["samples"],
            autocast=module.autocast,
        )

    sample(WARM_UP)
    began = contest.now(device)
    completions = sample(job["max_new_tokens"])
    seconds = contest.now(device) - began
    answers = [(list(c.ids), c.ended) for c in completions]
    replay.file(job).write_text(json.dumps({"ends": sorted(ends), "answers": answers}))
    dist.shutdown()
    return measured(job, device, seconds)


def plain(job, _) -> dict:
    """transformers' generate."""
    device = contest.default_device()
    tokenizer, prompts = open_prompts(job)
    drawn = json.loads(replay.file(job).read_text())
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[job["precision"]]
    lm = transformers.AutoModelForCausalLM.from_pretrained(job["model"], dtype=dtype).to(device)
    k = job["samples"]
    answers = [ids for ids, _ in drawn["answers"]]
    replay.draws_again(
        lm, {tuple(ids): answers[i * k : (i + 1) * k] for i, ids in enumerate(prompts)}
    )
    batch = tokenizer.pad(
        {"input_ids": [ids for ids in prompts for _ in range(k)]},
        padding_side="left",
        return_tensors="pt",
    ).to(device)
    config = transformers.GenerationConfig(
        do_sample=True,
        top_k=0,
        eos_token_id=drawn["ends"],
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )

    def sample(max_new_tokens):
        config.max_new_tokens = max_new_tokens
        with torch.no_grad():
            lm.generate(batch["input_ids"], batch["attention_mask"], generation_config=config)

    sample(WARM_UP)
    began = contest.now(device)
    sample(job["max_new_tokens"])
    return measured(job, device, contest.now(device) - began)


def measured(job, device, seconds) -> dict:
    found = replay.lengths(json.loads(replay.file(job).read_text())["answers"])
    speed, peak_gb = found["tokens"] / seconds, meter.peak_memory(device)
    said = f"{seconds:.2f} s, {speed:.0f} tokens/s, {found['ended']:.0%} ended, {peak_gb:.2f} GB"
    return found | {"seconds": seconds, "speed": speed, "peak_gb": peak_gb, "said": said}


def add_arguments(parser):
    replay.add_arguments(parser)
    parser.add_argument("--prompts", type=int, default=16, help="distinct prompts (default 16)")


def report(args, names, runs):
    """The table, and nothing that could be wrong."""
    lines = [replay.header(args, runs)]
    columns = (
        "contender",
        "precision",
        "tokens/s: median (min-max)",
        "ours is faster by",
        "peak GB",
    )
    rows = []
    for precision in args.precision:
        drawn = contest.sound(runs, "ours", precision)
        lines.append(
            f"{precision}: {drawn[0]['ended']:.1%} of the answers ended by themselves; {drawn[0]['tokens']:,} "
            f"tokens, lengths {drawn[0]['quartiles']} (minimum, quartiles, maximum)."
        )
        ours = statistics.median(r["speed"] for r in drawn)
        for name in names:
            mine = contest.sound(runs, name, precision)
            if not mine:
                rows.append((name, precision, "failed", "", ""))
                continue
            speeds = [r["speed"] for r in mine]
            middle = statistics.median(speeds)
            spread = f"{middle:.0f} ({min(speeds):.0f}-{max(speeds):.0f})"
            peak = max(r["peak_gb"] for r in mine)
            rows.append((name, precision, spread, f"{ours / middle:.2f}x", f"{peak:.2f}"))
    return [*lines, "", *contest.markdown(columns, rows)], True


if __name__ == "__main__":
    contest.run(
        contest.Contest(
            script=__file__,
            doc=__doc__,
            contenders={"ours": ours, "plain": plain},
            add_arguments=add_arguments,
            check=lambda args: None,
            names=lambda args: ["ours", "plain"],
            report=report,
            first=("ours",),
        )
    )
