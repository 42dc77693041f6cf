"""Rollouts in benchmarks: prompts with short answers, and samples that one contender draws and the others
draw again, so that all of them write the same tokens.
"""

import json
import time
from pathlib import Path

import torch
import transformers

from tests.benchmarks import contest

BUILTIN = Path(__file__).resolve().parents[2] / "train/data/builtin/prompts.jsonl"
# Raw samples of a small model ramble on: asked for this, most of them end, at many lengths.
ASKED = " Answer in one or two sentences."
CERTAIN = 1e4  # a logit beside which all others' probabilities are 0 in fp32


def add_arguments(parser):
    """The arguments of benchmarks of rollouts."""
    add = parser.add_argument
    add("--data", default=str(BUILTIN), help="a jsonl file of prompts; default: the built-in ones")
    add("--ask", default=ASKED, help=f"put behind each prompt (default {ASKED!r})")
    add("--samples", type=int, default=8, help="answers to a prompt (default 8)")
    add("--max-new-tokens", type=int, default=64, help="most tokens of an answer (default 64)")


def read_prompts(job, count) -> list[str]:
    """The first `count` prompts of --data with --ask behind each."""
    lines = Path(job["data"]).read_text().splitlines()[:count]
    if len(lines) < count:
        raise ValueError(f"{job['data']} has {len(lines)} prompts, fewer than {count}")
    return [json.loads(line)["prompt"] + job["ask"] for line in lines]


def file(job) -> Path:
    """Where a round's samples lie."""
    return Path(job["shared"]) / f"samples_{job['precision']}.json"


def header(args, runs) -> str:
    """What was drawn, where, and how often."""
    return (
        f"{Path(args.model).name}, {args.prompts} prompts by {args.samples} samples, at most "
        f"{args.max_new_tokens} tokens, {contest.device_name()} with {contest.threads(runs)} threads, "
        f"torch {torch.__version__}, {args.rounds} rounds."
    )


def lengths(answers) -> dict:
    """What is said of (ids, ended) of answers."""
    sizes = [len(ids) for ids, _ in answers]
    return {
        "tokens": sum(sizes),
        "ended": sum(ended for _, ended in answers) / len(answers),
        "quartiles": [int(q) for q in torch.tensor(sizes).double().quantile(
            torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0]).double()).tolist()],
    }  # fmt: skip


class Again(transformers.LogitsProcessor):
    """Has `generate` draw given tokens: it computes, warps and draws as always, from logits among
    which the given token's outweighs all others. In place, which takes no time worth naming.
    """

    def __init__(self, answers: list[list[int]], prompt_width: int):
        """answers: (B,) token ids of each."""
        longest = max(map(len, answers))
        self.tokens = torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids in answers])
        self.rows, self.start = torch.arange(len(answers)), prompt_width

    def __call__(self, input_ids, scores):
        """(B, tokens so far), (B, V) -> (B, V)"""
        tokens = self.tokens[:, input_ids.shape[1] - self.start].to(scores.device)
        scores[self.rows.to(scores.device), tokens] = CERTAIN
        return scores


def draws_again(lm, answers_of: dict[tuple, list[list[int]]]) -> list[float]:
    """Have `lm.generate` draw these answers to these prompts (token ids), in turn where a batch has a
    prompt more than once. Returns a list that gets the seconds of each call.
    """
    generate, seconds = lm.generate, []

    def generate_again(input_ids, attention_mask, **options):
        began = time.perf_counter()
        turn = dict.fromkeys(answers_of, 0)
        answers = []
        for row, mask in zip(input_ids, attention_mask, strict=True):
            prompt = tuple(row[mask.bool()].tolist())
            answers.append(answers_of[prompt][turn[prompt]])
            turn[prompt] += 1
        processor = Again(answers, input_ids.shape[1])
        out = generate(
            input_ids=input_ids,
            attention_mask=attention_mask,
            logits_processor=[processor],
            **options,
        )
        drawn = out[:, input_ids.shape[1] :].tolist()
        pairs = zip(drawn, answers, strict=True)
        assert all(row[: len(ids)] == ids[: len(row)] for row, ids in pairs)
        seconds.append(contest.now(lm.device) - began)
        return out

    lm.generate = generate_again
    return seconds
