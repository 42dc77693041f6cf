"""An exported score model against transformers alone, on texts as everybody renders them.

The oracle: AutoTokenizer renders and pads, AutoModelForSequenceClassification scores. Kinds of
tokenizer: ChatML whose pad is its end token, one without a pad (Llama 3), one with a pad of its own
(Gemma), sentencepiece-like ones.
"""

import json

import pytest
import tiny
import torch
import transformers

from tests.data import families
from train.data import padding
from train.data.packing import pack
from train.data.tokens import collect
from train.engine import dist
from train.models import heads
from train.models.heads import ScoreModel
from train.run import export

LINES = (tiny.ROOT / "train/data/builtin/train.jsonl").read_text().splitlines()
ROWS = [
    {name: text[:limit] for name, text in json.loads(line).items()}
    for line, limit in zip(LINES, (400, 30, 90, 250), strict=False)
]
# kind -> (tokenizer and template in tests/data/families.py, pad token)
KINDS = {
    "chatml": None,
    "no pad": ("byte-level", "after a newline", None),
    "own pad": ("byte-level", "after a marker", "<unk>"),
    "sentencepiece": ("sentencepiece, legacy", "a space before the answer", None),
    "unigram": ("unigram first", "after a newline", "</s>"),
}


def make_tokenizer(kind, folder):
    if kind == "chatml":
        return tiny.save_tokenizer(folder)
    name, template, pad = KINDS[kind]
    tokenizer = families.tokenizer(name, template)
    tokenizer.pad_token = pad
    return tokenizer


def conversations():
    """Eight of mixed lengths, in the order of a batch's responses."""
    return [
        [
            {"role": "user", "content": row["prompt"]},
            {"role": "assistant", "content": row[name]},
        ]
        for row in ROWS
        for name in ("chosen", "rejected")
    ]


@pytest.fixture(scope="module", params=KINDS)
def exported(request, tmp_path_factory):
    """(the kind, our scores, the directory) of a random score model in its own export."""
    folder = tmp_path_factory.mktemp("score")
    tokenizer = make_tokenizer(request.param, folder / "tokenizer")
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    data = collect(
        [str(path)], tokenizer, max_length=512, keep_tail=True, cache_dir=folder, kind="margin"
    )
    assert len(data) == len(ROWS)
    pad_id = 2 if request.param == "chatml" else tokenizer.pad_token_id
    # As a run begins, and as pretrained weights are: at the other tests' larger ones fp32 itself is
    # 4e-6 (ours) and 7e-6 (transformers) from fp64, and 1e-5 would be a matter of luck.
    lm = tiny.make_score_model("llama", pad_token_id=pad_id, initializer_range=0.05)
    heads.draw_head(lm.score.weight, seed=0)
    module = ScoreModel(lm)
    padding.use(tokenizer, module.lm.config, [data])
    batch = pack([data.group(i) for i in range(len(data))])
    gap = export.model_directory(module, tokenizer, folder / "model", [batch])
    assert gap == 0 and dist.world_size() == 1
    with torch.no_grad():
        return request.param, module(batch), folder / "model"


def opened(folder):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    lm = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    return tokenizer, lm


@pytest.mark.parametrize("side", ["right", "left"])
def test_scores_of_a_padded_batch(exported, side):
    kind, scores, folder = exported
    tokenizer, lm = opened(folder)
    texts = [tokenizer.apply_chat_template(each, tokenize=False) for each in conversations()]
    inputs = tokenizer(
        texts, add_special_tokens=False, padding=True, padding_side=side, return_tensors="pt"
    )
    lengths = inputs["attention_mask"].sum(1)
    assert lengths.min() < lengths.max() / 2  # most rows are padded
    with torch.no_grad():
        logits = lm(inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    assert logits.shape == (8, 1) and lm.config.num_labels == 1
    assert (logits[:, 0] - scores).abs().max() < 1e-5
    assert scores.std() > 0.1  # else nothing would have been compared


def test_one_text_alone(exported):
    _, scores, folder = exported
    tokenizer, lm = opened(folder)
    for each, score in zip(conversations(), scores, strict=True):
        ids = tokenizer.apply_chat_template(each, return_tensors="pt", return_dict=True)
        with torch.no_grad():
            assert (lm(**ids).logits[0, 0] - score).abs() < 1e-5


def test_a_pipeline_on_rendered_text(exported):
    kind, scores, folder = exported
    pipe = transformers.pipeline(
        "text-classification", model=str(folder), function_to_apply="none", device="cpu"
    )
    texts = [pipe.tokenizer.apply_chat_template(each, tokenize=False) for each in conversations()]
    found = pipe(texts, batch_size=4, add_special_tokens=False)
    assert [each["score"] for each in found] == pytest.approx(scores.tolist(), abs=1e-5)


def test_weights_come_back_bit_for_bit(exported):
    _, _, folder = exported
    lm, again = opened(folder)[1], opened(folder)[1]
    lm.save_pretrained(folder / "again")
    again = transformers.AutoModelForSequenceClassification.from_pretrained(folder / "again")
    for name, weight in lm.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name]), name


def test_where_the_pad_is_the_end_token_another_one_is_read(tmp_path):
    """The trap: a text cut at its end token, under the pad that SmolLM comes with, is scored off the
    token before, without a message. With the pad that is chosen here it is scored off its last.
    """
    tokenizer = tiny.save_tokenizer(tmp_path)
    assert tokenizer.pad_token == tokenizer.eos_token
    lm = tiny.make_score_model("llama")  # its pad is 2, the end token
    text = tokenizer.apply_chat_template(conversations()[1], tokenize=False).rstrip("\n")
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    assert ids[0, -1] == lm.config.pad_token_id
    with torch.no_grad():
        every = lm.score(lm.model(ids).last_hidden_state)[0, :, 0]
        assert lm(ids).logits[0, 0] == every[-2] != every[-1]
        pad_id = padding.use(tokenizer, lm.config, [])
        assert pad_id == tokenizer.pad_token_id == lm.config.pad_token_id == 0
        assert lm(ids).logits[0, 0] == every[-1]


@pytest.mark.parametrize(
    "pad, expected", [(2, 0), (None, 0), (0, 0), (5000, 0), (7, 7)], ids=lambda x: str(x)
)
def test_the_pad_that_is_chosen(tmp_path, pad, expected):
    """The model's own where no text ends in it, else an added token that no text uses."""
    tokenizer = tiny.save_tokenizer(tmp_path)
    assert padding.choose(tokenizer, pad, tiny.VOCAB, []) == expected


def test_a_cut_text_may_end_in_any_token(tmp_path):
    tokenizer = tiny.save_tokenizer(tmp_path / "tokenizer")
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ROWS[0]) + "\n")
    whole = collect([str(path)], tokenizer, max_length=512, keep_tail=True, cache_dir=tmp_path)
    length = int(whole.lengths[0, 0]) + 5
    data = collect([str(path)], tokenizer, max_length=length, keep_tail=True, cache_dir=tmp_path)
    last = data.group(0).responses[0][-1]
    assert padding.choose(tokenizer, last, tiny.VOCAB, [whole]) == last
    assert padding.choose(tokenizer, last, tiny.VOCAB, [data]) == 0


def test_no_token_is_left(tmp_path):
    tokenizer = tiny.save_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="no token is left for padding"):
        padding.choose(tokenizer, None, 0, [])


def test_the_pad_token_of_a_template_that_changes_answers(tmp_path):
    """What ends a text is found without the answer standing in it as it was given."""
    tokenizer = tiny.save_tokenizer(tmp_path)
    [newline] = tokenizer("\n")["input_ids"]
    tokenizer.chat_template = tiny.CHATML.replace("m['content']", "m['content'] | upper")
    assert padding.choose(tokenizer, newline, tiny.VOCAB, []) == 0
    assert padding.choose(tokenizer, 7, tiny.VOCAB, []) == 7
