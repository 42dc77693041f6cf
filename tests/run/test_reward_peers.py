"""Six steps of our reward model training beside TRL's RewardTrainer: the same weights, head, rendered
texts, order and AdamW, in fp32.
"""

import json

import pytest
import tiny
import torch

from train.data import padding
from train.data.packing import pack
from train.data.tokens import collect
from train.losses import reward as losses
from train.methods import reward
from train.models.heads import ScoreModel
from train.models.pretrained import load_score_model, load_tokenizer

pytestmark = pytest.mark.slow
STEPS, PAIRS, RATE = 6, 8, 1e-3


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """(a score model's directory whose pad token ends no text, the pairs as a file and as rows)."""
    folder = tmp_path_factory.mktemp("peers")
    lm, tokenizer = tiny.make_score_model("llama"), tiny.save_tokenizer(folder / "model")
    padding.use(tokenizer, lm.config, [])
    lm.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    lines = (tiny.ROOT / "train/data/builtin/train.jsonl").read_text().splitlines()
    rows = [json.loads(line) | {"margin": i % 3 / 2} for i, line in enumerate(lines)]
    rows = rows[: STEPS * PAIRS]
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "model", path, rows


def theirs(model, rows, folder, centering):
    """TRL's loss of each step."""
    trl = pytest.importorskip("trl")
    import datasets
    from torch.utils.data import SequentialSampler

    class InOrder(trl.RewardTrainer):
        def _get_train_sampler(self, *_):
            return SequentialSampler(self.train_dataset)

    def turns(row, name):
        return [
            {"role": "user", "content": row["prompt"]},
            {"role": "assistant", "content": row[name]},
        ]

    data = datasets.Dataset.from_list(
        [
            {"chosen": turns(row, "chosen"), "rejected": turns(row, "rejected")}
            | {"margin": row["margin"]}
            for row in rows
        ]
    )
    arguments = trl.RewardConfig(
        output_dir=str(folder),
        per_device_train_batch_size=PAIRS,
        max_steps=STEPS,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=1.0,
        optim="adamw_torch",
        logging_steps=1,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        max_length=1024,
        center_rewards_coefficient=centering or None,
        report_to="none",
        save_strategy="no",
    )
    lm, _ = load_score_model(model)
    trainer = InOrder(
        model=lm, args=arguments, train_dataset=data, processing_class=load_tokenizer(model)
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def ours(model, path, folder, centering):
    """Our loss of each step, packed and prompt-sharing."""
    lm, _ = load_score_model(model)
    module = ScoreModel(lm)
    data = collect(
        [str(path)],
        load_tokenizer(model),
        max_length=1024,
        kind="margin",
        keep_tail=True,
        cache_dir=folder,
    )
    assert len(data) == STEPS * PAIRS and not data.truncated.any()
    loss = losses.choose("bradley_terry", {"centering": centering})
    optimizer = torch.optim.AdamW(lm.parameters(), lr=RATE, weight_decay=0.0)
    means = []
    for step in range(STEPS):
        batch = pack([data.group(i) for i in range(step * PAIRS, (step + 1) * PAIRS)])
        mean = loss(reward.examples(module(batch), batch, of_pairs=True)).mean()
        optimizer.zero_grad()
        mean.backward()
        torch.nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
        optimizer.step()
        means.append(mean.item())
    return means


@pytest.mark.parametrize("centering", [0.0, 0.01])
def test_losses_step_by_step(start, tmp_path, centering):
    model, path, rows = start
    expected = theirs(model, rows, tmp_path / "trl", centering)
    found = ours(model, path, tmp_path, centering)
    assert len(expected) == STEPS and max(expected) - min(expected) > 0.05
    assert found == pytest.approx(expected, abs=1e-5)
