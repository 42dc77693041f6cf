"""How far training's losses are from an fp64 oracle's, ours beside TRL's, on the same token ids.

    python tests/benchmarks/oracle_distance.py --data PAIRS.jsonl [MORE.jsonl ...]
    python tests/benchmarks/oracle_distance.py --data PAIRS.jsonl --code . OTHER_CHECKOUT

Six steps of DPO (sigmoid, beta 0.1, AdamW at a constant 1e-3, clipping to 1, eight pairs a step) of a
tiny random Llama (tests/tiny.py) in fp32. Ours is the user's command, `launch/train_dpo.py` of each
checkout that --code names; TRL's DPOTrainer (pip install -e '.[peers]') gets one pair a micro-batch
and accumulates. The oracle is neither's code: the same weights in fp64, one sequence at a time, full
logits, plain autograd and torch's AdamW, transformers' own casts to fp32 lifted (tests/wide.py).

Prints, for each file, the largest difference of a step's loss from the oracle's over all steps, and
over the first (before any update: what the loss's own sums cost, without what rounding did to the
weights).
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import transformers

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import tiny
import wide

from train.data import steps, tokens

STEPS, PAIRS, BETA, LR, CLIP = 6, 8, 0.1, 1e-3, 1.0
MAX_LENGTH, MAX_PROMPT = 1024, 256


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", nargs="+", required=True)
    parser.add_argument(
        "--code", nargs="+", default=[str(ROOT)], help="checkouts whose loop is run"
    )
    args = parser.parse_args()
    names = [f"ours in {Path(code).resolve().name}" for code in args.code]
    print("| pairs | " + " | ".join([*names, "TRL"]) + " | mean tokens of an answer |")
    print("|---" * (len(names) + 3) + "|")
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        # another reference than the policy: at the start margins would be 0 for everybody
        policy = tiny.save_model(folder / "policy", max_position_embeddings=MAX_LENGTH)
        reference = tiny.save_model(
            folder / "reference", seed=1, max_position_embeddings=MAX_LENGTH
        )
        for number, path in enumerate(args.data):
            tokenizer = transformers.AutoTokenizer.from_pretrained(policy)
            data = tokens.prepare(
                [path],
                tokenizer,
                max_length=MAX_LENGTH,
                max_prompt_length=MAX_PROMPT,
                max_dropped=1.0,
            )
            planned = list(
                steps.plan_steps(data.lengths.sum(1), PAIRS, MAX_LENGTH, seed=0, total=STEPS)
            )
            groups = [[data.group(i) for i in plan.groups] for plan in planned]
            exact = oracle(policy, reference, groups)
            contenders = [
                ours(code, policy, reference, path, folder / f"run-{number}-{i}")
                for i, code in enumerate(args.code)
            ]
            contenders.append(trl(tokenizer, policy, reference, groups, folder / f"trl-{number}"))
            cells = [distance(losses, exact) for losses in contenders]
            answers = data.lengths[[i for plan in planned for i in plan.groups], 1:].mean()
            print(f"| {Path(path).name} | " + " | ".join(cells) + f" | {answers:.0f} |", flush=True)


def distance(losses, exact):
    gaps = [abs(loss - true) for loss, true in zip(losses, exact, strict=True)]
    return f"{max(gaps):.1e} (first step {gaps[0]:.1e})"


def oracle(policy, reference, groups):
    """The mean loss of each step's pairs, fp64 throughout."""
    lm, frozen = (
        transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).double()
        for path in (policy, reference)
    )
    optimizer = torch.optim.AdamW(lm.parameters(), lr=LR, weight_decay=0.0)

    def logp(model, prompt, response):
        ids = torch.tensor([*prompt, *response])
        with wide.Wide():
            logits = model(input_ids=ids[None], use_cache=False).logits[0]
        logps = torch.log_softmax(logits, dim=-1)[len(prompt) - 1 : -1]
        return logps.gather(1, ids[len(prompt) :, None]).sum()

    means = []
    for step in groups:
        losses = []
        for group in step:
            ratios = []
            for response in group.responses:
                with torch.no_grad():
                    ref_logp = logp(frozen, group.prompt, response)
                ratios.append(logp(lm, group.prompt, response) - ref_logp)
            loss = -torch.nn.functional.logsigmoid(BETA * (ratios[0] - ratios[1]))
            (loss / len(step)).backward()
            losses.append(float(loss))
        torch.nn.utils.clip_grad_norm_(lm.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        means.append(sum(losses) / len(losses))
    return means


def ours(code, policy, reference, data, output):
    """The loss of each step, from the log of the user's command."""
    code = Path(code).resolve()
    flags = {
        "model": policy,
        "reference_model": reference,
        "data": Path(data).resolve(),
        "output": output,
        "beta": BETA,
        "lr": LR,
        "lr_scheduler": "constant",
        "grad_clip": CLIP,
        "batch_size": PAIRS,
        "max_steps": STEPS,
        "max_length": MAX_LENGTH,
        "max_prompt_length": MAX_PROMPT,
        "max_dropped": 1.0,
        "precision": "fp32",
    }
    command = [sys.executable, "launch/train_dpo.py"]
    for name, value in flags.items():
        command += [f"--{name}", str(value)]
    environment = {**os.environ, "PYTHONPATH": str(code)}
    subprocess.run(command, cwd=code, env=environment, check=True, capture_output=True)
    log = (output / "logs/rank-0.log").read_text()
    return [float(loss) for loss in re.findall(r"INFO step \d+ \{.*?'loss': ([\d.e+-]+)", log)]


def trl(tokenizer, policy, reference, groups, folder):
    """The loss of each step of TRL's DPOTrainer, on our ids in our order."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    pairs = [group for step in groups for group in step]
    columns = {
        "prompt_ids": [list(pair.prompt) for pair in pairs],
        "chosen_ids": [list(pair.responses[0]) for pair in pairs],
        "rejected_ids": [list(pair.responses[1]) for pair in pairs],
    }
    args = DPOConfig(
        str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=PAIRS,
        learning_rate=LR,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=CLIP,
        beta=BETA,
        max_length=MAX_LENGTH,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
    )
    losses = []

    class InOrder(DPOTrainer):
        def _prepare_dataset(self, dataset, *_, **__):
            return dataset  # it holds ids already

        def _get_train_sampler(self, *_):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    class Record(transformers.TrainerCallback):
        def on_log(self, *_, logs, **__):
            if "loss" in logs:
                losses.append(float(logs["loss"]))

    models = [
        transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        for path in (policy, reference)
    ]
    trainer = InOrder(
        *models,
        args=args,
        train_dataset=Dataset.from_dict(columns),
        processing_class=tokenizer,
        callbacks=[Record()],
    )
    trainer.train()
    return losses


if __name__ == "__main__":
    main()
