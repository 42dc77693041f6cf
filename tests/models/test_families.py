"""Log-probabilities of real rows, tokenised by every kind of tokenizer, against transformers alone: the
conversation rendered whole, one at a time, all logits, fp64.
"""

import json

import pytest
import tiny
import torch
from wide import Wide

from tests.data import families
from train.data.chat import Chat
from train.data.packing import pack
from train.data.tokens import collect
from train.models.backbone import Backbone

ROWS = 10
TEMPLATES = ("after a newline", "after a marker", "a space before the answer")


def rows(tmp_path):
    """The first pairs that ship with the project."""
    lines = (tiny.ROOT / "train/data/builtin/train.jsonl").read_text().splitlines()[:ROWS]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    return str(tmp_path / "rows.jsonl"), [json.loads(line) for line in lines]


@pytest.mark.parametrize("kind", families.TOKENIZERS)
def test_log_probs_of_rows_are_transformers(kind, tmp_path):
    path, pairs = rows(tmp_path)
    for template in TEMPLATES:
        tokenizer = families.tokenizer(kind, template)
        lm = tiny.make_model(
            dtype=torch.float64, vocab_size=len(tokenizer), max_position_embeddings=2048
        )
        data = collect([path], tokenizer, max_length=2048)
        assert len(data) == ROWS
        end_id = Chat(tokenizer).end_id
        expected, compared = [], []
        with torch.no_grad(), Wide():
            for pair in pairs:
                turns = [{"role": "user", "content": pair["prompt"]}]
                prompt = tokenizer.apply_chat_template(
                    turns, add_generation_prompt=True, return_dict=False
                )
                for name in ("chosen", "rejected"):
                    answer = {"role": "assistant", "content": pair[name]}
                    ids = tokenizer.apply_chat_template([*turns, answer], return_dict=False)
                    ids = ids[: ids.index(end_id, len(prompt)) + 1]
                    # Unigram may put the header's last space and a letter into one token.
                    compared.append(ids[: len(prompt)] == prompt)
                    logits = lm(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
                    logps = logits.log_softmax(-1)[:-1]  # (P + R - 1, V) nats
                    taken = logps.gather(1, torch.tensor(ids[1:])[:, None])[len(prompt) - 1 :]
                    expected.append(taken.sum())
            batch = pack([data.group(i) for i in range(ROWS)])
            found = Backbone(lm)(batch).split(batch.lengths.tolist())
        found = torch.stack([logps.sum() for logps in found])
        difference = (found - torch.stack(expected)).abs()[torch.tensor(compared)]
        assert difference.max() < 1e-9, (kind, template)
        assert len(difference) >= 2 * ROWS - ("unigram" in kind), (kind, template)
