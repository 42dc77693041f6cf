"""Whole runs of launch/train_reward.py on a tiny model with a real tokenizer."""

import json
import math
import shutil
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors import safe_open

from tests.launch.compare import (
    ROOT,
    STEPS,
    charts,
    flags,
    moments,
    same_bits,
    same_run,
    scalars,
    straight,
    weights,
)
from tests.launch.test_resume import killed_and_continued
from tests.launch.test_validate import larger
from tests.launch.warm import Warm
from train.data.mixing import shuffled
from train.data.packing import pack
from train.data.tokens import collect
from train.models.heads import ScoreModel
from train.models.pretrained import load_score_model


@pytest.fixture(scope="module")
def warm(tmp_path_factory):
    """Ranks of launch/train_reward.py without their imports."""
    with Warm(tmp_path_factory.mktemp("cache"), "launch/train_reward.py") as process:
        yield process


@pytest.fixture(scope="module")
def finished(warm, model_dir, few, tmp_path_factory):
    """A run left alone, of one rank at ZeRO 0."""
    out = tmp_path_factory.mktemp("reward") / "out"
    straight(warm, model_dir, few, out, 0, 1)
    return out


def rows(path, count=None):
    return [json.loads(line) for line in path.read_text().splitlines()[:count]]


def test_what_a_run_leaves(finished, few):
    """Curves, results with their intervals, a card, and a model that is better than by chance on
    the pairs that it was trained on.
    """
    run = json.loads((finished / "run.json").read_text())
    found = scalars(finished)
    names = ("loss", *(f"rewards/{n}" for n in ("accuracies", "margins", "chosen", "rejected")))
    for name in names:
        assert [step for step, _ in found[f"val/{name}"]] == [0, 3, 6, 8]
        assert [step for step, _ in found[f"train/{name}"]] == [2, 4, 6, 8]
    assert not any("logps" in tag or "bf16" in tag for tag in found)
    drawn = charts(finished / "tensorboard")
    assert "log-prob of chosen" not in drawn and all(drawn.values())
    results = run["results"]
    assert results["rewards/accuracies"] > 0.75 and results["loss"] < 0.6
    assert run["evaluations"]["8"]["pairs"] == 44 and run["task"] == "reward"
    low, high = run["evaluations"]["8"]["rewards/accuracies_interval"]
    assert low < results["rewards/accuracies"] < high
    assert run["export_gap_of_scores"] == 0.0
    card = (finished / "model/README.md").read_text()
    assert (
        "pipeline_tag: text-classification" in card and "AutoModelForSequenceClassification" in card
    )
    assert "arxiv:2203.02155" in card and "reference" not in card
    assert f"mean {run['scores']['mean']:.4g}, standard deviation" in card
    lengths = [len(row["chosen"]) - len(row["rejected"]) for row in rows(few)]
    assert set(run["baselines"]) == {"longer_wins", "bag_of_words"}
    by_characters = sum((x > 0) + (x == 0) / 2 for x in lengths) / len(lengths)
    assert abs(run["baselines"]["longer_wins"] - by_characters) < 0.1  # it goes by tokens
    assert run["baselines"]["bag_of_words"] > 0.95  # these are the pairs that it was fitted on
    for title, value in (("longer answer wins", "longer_wins"), ("bag of words", "bag_of_words")):
        assert f"without a model: {title} |  | {run['baselines'][value]:.4g}" in card


def test_the_model_is_read_by_transformers_alone(finished, few):
    """The numbers of the last evaluation again: rendered texts, a padded batch, the class's logits.
    Its mean and deviation are in the configuration.
    """
    tokenizer = transformers.AutoTokenizer.from_pretrained(finished / "model")
    lm = transformers.AutoModelForSequenceClassification.from_pretrained(finished / "model").eval()
    assert lm.config.architectures == ["LlamaForSequenceClassification"]
    texts = [
        tokenizer.apply_chat_template(
            [
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": row[name]},
            ],
            tokenize=False,
        )
        for row in rows(few)
        for name in ("chosen", "rejected")
    ]
    inputs = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")
    with torch.no_grad():
        scores = lm(inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, 0]
    run = json.loads((finished / "run.json").read_text())
    last = run["evaluations"]["8"]
    margins = scores[0::2] - scores[1::2]
    assert margins.mean().item() == pytest.approx(last["rewards/margins"], abs=1e-5)
    assert (margins > 0).float().mean().item() == pytest.approx(last["rewards/accuracies"])
    assert lm.config.score_mean == pytest.approx(scores.mean().item(), abs=1e-5)
    assert lm.config.score_std == pytest.approx(scores.std().item(), abs=1e-5)
    assert run["scores"]["answers"] == 88 and run["scores"]["data"] == "held out"


@pytest.mark.parametrize(
    "stage, ranks", [pytest.param(0, 1, marks=pytest.mark.slow), pytest.param(3, 2)]
)
def test_the_loss_of_the_first_step(warm, few, model_dir, tmp_path, stage, ranks):
    """By hand: the run's own head, drawn with its seed, on the first step's pairs alone; on shards
    of two ranks as on one.
    """
    extra = ("--max_steps", 1, "--log_every", 1, "--lr", 0)
    codes, text = warm.run(flags(model_dir, few, tmp_path / "out", stage, *extra), ranks)
    assert codes == [0] * ranks, text[-3000:]
    lm, _ = load_score_model(tmp_path / "out/model")
    again, _ = load_score_model(model_dir, needs_head=False)
    assert torch.equal(lm.model.embed_tokens.weight, again.model.embed_tokens.weight)
    random = torch.Generator().manual_seed(7)
    drawn = torch.randn(1, 64, generator=random) / math.sqrt(65)
    assert torch.equal(lm.score.weight, drawn)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_dir)
    data = collect([str(few)], tokenizer, max_length=512, max_prompt_length=256, keep_tail=True)
    first = [data.group(int(i)) for i in shuffled(len(data), 7, 0)[:8]]
    scores = ScoreModel(lm.double())(pack(first)).view(-1, 2)
    expected = torch.log1p(torch.exp(scores[:, 1] - scores[:, 0])).mean().item()
    found = scalars(tmp_path / "out", expected=("train/loss",))["train/loss"]
    assert found[0] == (1, pytest.approx(expected, abs=1e-5))


def test_scores_are_measured_on_the_training_data_where_nothing_is_held_out(
    warm, model_dir, few, tmp_path
):
    arguments = flags(model_dir, few, tmp_path / "out", 0, "--max_steps", 2)
    for flag in ("--eval_data", "--eval_every"):  # the second counts with the first alone
        place = arguments.index(flag)
        del arguments[place : place + 2]
    codes, text = warm.run(arguments, patch={"train.methods.reward.NORMALISED_ON": 5})
    assert codes == [0], text[-3000:]
    run = json.loads((tmp_path / "out/run.json").read_text())
    assert (run["scores"]["answers"], run["scores"]["data"]) == (10, "training")
    assert list(run["results"]) == ["train_loss"] and "longer answer wins" not in text
    command = f"eval/evaluate.py --reward_model {tmp_path}/out/model --output {tmp_path}/out/eval"
    assert command in text
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_dir)
    data = collect([str(few)], tokenizer, max_length=512, max_prompt_length=256, keep_tail=True)
    lm, _ = load_score_model(tmp_path / "out/model")
    with torch.no_grad():
        scores = ScoreModel(lm)(pack([data.group(i) for i in range(5)]))
    assert lm.config.score_mean == pytest.approx(scores.mean().item(), abs=1e-5)
    assert lm.config.score_std == pytest.approx(scores.std().item(), abs=1e-5)


def test_killed_once_and_continued_is_bit_for_bit_the_same(warm, model_dir, few, tmp_path):
    straight(warm, model_dir, few, tmp_path / "straight", 2, 2)
    _, text = killed_and_continued(warm, model_dir, few, tmp_path / "killed", 2, 2, 1, seed=3)
    assert "continues after step" in text
    same_run(tmp_path / "killed", tmp_path / "straight")
    one, other = (
        json.loads((tmp_path / name / "run.json").read_text()) for name in ("killed", "straight")
    )
    assert one["scores"] == other["scores"]


@pytest.mark.matrix
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_killed_five_times(warm, model_dir, few, tmp_path, stage, ranks):
    straight(warm, model_dir, few, tmp_path / "straight", stage, ranks)
    killed_and_continued(
        warm, model_dir, few, tmp_path / "killed", stage, ranks, 5, seed=10 * stage + ranks
    )
    same_run(tmp_path / "killed", tmp_path / "straight")


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_in_bf16_with_checkpointed_activations(warm, model_dir, few, tmp_path, stage):
    extra = ("--precision", "bf16", "--gradient_checkpointing", "true")
    straight(warm, model_dir, few, tmp_path / "out", stage, 1, *extra)
    results = json.loads((tmp_path / "out/run.json").read_text())["results"]
    assert results["rewards/accuracies"] > 0.75


def exported(checkpoint, folder):
    done = subprocess.run(
        [sys.executable, ROOT / "launch/export.py", checkpoint, folder],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_a_checkpoint_is_exported_without_the_run(finished, tmp_path):
    """launch/export.py gives the same weights, in the same class."""
    exported(finished / f"checkpoints/step-{STEPS}", tmp_path / "model")
    with safe_open(tmp_path / "model/model.safetensors", "pt") as file:
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    same_bits(found, weights(finished))
    config = json.loads((tmp_path / "model/config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    assert config["pad_token_id"] == 0


def test_training_goes_on_from_a_reward_model(finished, warm, few, tmp_path):
    """Its head is kept, not drawn anew: with a rate of 0 all weights stay bit for bit. What its own
    scores were like is not said of the new run's checkpoints.
    """
    extra = ("--lr", 0, "--max_steps", 1)
    codes, text = warm.run(flags(finished / "model", few, tmp_path / "out", 0, *extra))
    assert codes == [0], text[-3000:]
    same_bits(weights(tmp_path / "out"), weights(finished))
    checkpoint = tmp_path / "out/checkpoints/step-1/reward_model/config.json"
    before, during, after = (
        json.loads(path.read_text())
        for path in (finished / "model/config.json", checkpoint, tmp_path / "out/model/config.json")
    )
    assert before["score_mean"] == after["score_mean"] and "score_mean" not in during


@pytest.fixture(scope="module")
def adapted(warm, model_dir, few, tmp_path_factory):
    """A run of LoRA adapters."""
    pytest.importorskip("peft")
    out = tmp_path_factory.mktemp("adapters") / "out"
    straight(warm, model_dir, few, out, 0, 1, "--lora_rank", 4)
    return out


def test_adapters(adapted, model_dir):
    """The base stands still, the head is trained as a whole; the export is merged. peft itself puts
    the adapter, head included, onto the base and finds the same scores.
    """
    out = adapted
    assert len(moments(out)) == 3 * (2 * 2 * 7 + 1)  # two layers' seven matrices, and the head
    found = weights(out)
    with safe_open(model_dir / "model.safetensors", "pt") as file:
        base = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert torch.equal(found["model.embed_tokens.weight"], base["model.embed_tokens.weight"])
    changed = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(found[changed], base[changed])
    with safe_open(out / "model/adapter/adapter_model.safetensors", "pt") as file:
        head = file.get_tensor("base_model.model.score.weight")
    assert torch.equal(head, found["score.weight"])
    run = json.loads((out / "run.json").read_text())
    assert run["results"]["loss"] < run["evaluations"]["0"]["loss"]
    import peft

    def of(folder):
        return transformers.AutoModelForSequenceClassification.from_pretrained(
            folder, num_labels=1, pad_token_id=0
        )

    theirs = peft.PeftModel.from_pretrained(of(model_dir), out / "model/adapter").eval()
    ids = torch.tensor([[1, 40, 50, 60, 2, 70]])
    with torch.no_grad():
        merged = of(out / "model").eval()(ids).logits
        assert theirs(ids).logits.item() == pytest.approx(merged.item(), abs=1e-5)


@pytest.mark.slow
def test_a_checkpoint_of_adapters_is_exported(adapted, tmp_path):
    """As the run's own export is."""
    exported(adapted / f"checkpoints/step-{STEPS}", tmp_path / "exported")
    with safe_open(tmp_path / "exported/model.safetensors", "pt") as file:
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    same_bits(found, weights(adapted))


def test_single_answers_with_labels_and_scores(warm, model_dir, few, tmp_path):
    """The pairs' answers one by one: under logistic, labels; under squared, their lengths."""
    for name, columns in (("labels", ("label",)), ("scores", ("score",))):
        with (tmp_path / f"{name}.jsonl").open("w") as file:
            for row in rows(few):
                for side in ("chosen", "rejected"):
                    judged = {"label": side == "chosen", "score": len(row[side]) / 300}
                    answer = {"prompt": row["prompt"], "completion": row[side]}
                    answer |= {column: judged[column] for column in columns}
                    file.write(json.dumps(answer) + "\n")
    extra = ("--max_steps", 20, "--epochs", 9, "--eval_every", 0)
    for name, loss in (("labels", "logistic"), ("scores", "squared")):
        out, data = tmp_path / loss, tmp_path / f"{name}.jsonl"
        straight(warm, model_dir, data, out, 0, 1, *extra, "--loss", loss)
        run = json.loads((out / "run.json").read_text())
        first, last = run["evaluations"]["0"], run["evaluations"]["20"]
        assert last["loss"] < first["loss"] and last["pairs"] == 88
        assert last["rewards/correlation"] > max(0.3, first["rewards/correlation"])
        assert "rewards/margins" not in run["results"]
        assert ("rewards/accuracies" in run["results"]) == (loss == "logistic")
    # a length of 300 characters is a score of 1, and many are longer
    codes, text = warm.run(
        flags(model_dir, tmp_path / "scores.jsonl", tmp_path / "out", 0, "--loss", "logistic")
    )
    assert codes == [2] and "takes targets from 0 to 1, and" in text


@pytest.mark.parametrize(
    "change, extra, words",
    [
        (
            {},
            ("--loss", "logistic"),
            "takes single answers with labels or scores, and the data has",
        ),
        ({"margin": "much"}, (), "margin is 'much', not a finite number"),
        ({"margin": math.nan}, (), "margin is nan, not a finite number"),
        ({"rejected": "the same", "chosen": "the same"}, (), "chosen equals rejected"),
        (
            {},
            ("--margin", "scores"),
            "expected 'prompt', 'chosen', 'rejected', 'score_chosen', 'score_rejected'; rename",
        ),
        (
            {"scores_chosen": 2, "scores_rejected": 1},
            ("--margin", "scores"),
            "pass --columns score_chosen=scores_chosen score_rejected=scores_rejected",
        ),
    ],
)
def test_bad_data_is_a_clear_line(warm, model_dir, few, tmp_path, change, extra, words):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row | change) + "\n" for row in rows(few, 4)))
    codes, text = warm.run(flags(model_dir, path, tmp_path / "out", 0, *extra))
    assert codes in ([2], [4]) and words in text, text[-2000:]
    assert "Traceback" not in text


def test_models_that_cannot_be_rewarded_from(warm, model_dir, few, tmp_path):
    """Two labels; a tokenizer with a token that the model lacks, in the data: said before anything
    is trained.
    """
    lm = transformers.AutoModelForCausalLM.from_pretrained(model_dir)
    lm.config.num_labels = 2
    two = transformers.AutoModelForSequenceClassification.from_config(lm.config)
    two.save_pretrained(tmp_path / "two")
    transformers.AutoTokenizer.from_pretrained(model_dir).save_pretrained(tmp_path / "two")
    codes, text = warm.run(flags(tmp_path / "two", few, tmp_path / "out"))
    assert codes == [2] and "two is no reward model: it has 2 outputs, not 1" in text
    other = larger(model_dir, tmp_path / "larger")
    shutil.copy(model_dir / "model.safetensors", other)
    far = rows(few, 4)
    far[2]["rejected"] = "How <far> is it?"
    path = tmp_path / "far.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in far))
    codes, text = warm.run(flags(other, path, tmp_path / "out"))
    assert codes == [2], text[-2000:]
    assert "the data has token 1,024, '<far>', and the model's vocabulary is 1,024" in text
    assert "Traceback" not in text


def test_one_pair_is_enough_to_run(warm, model_dir, few, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(rows(few, 1)[0]) + "\n")
    codes, text = warm.run(flags(model_dir, path, tmp_path / "out", 0, "--max_steps", 2), 2)
    assert codes == [0, 0], text[-3000:]
