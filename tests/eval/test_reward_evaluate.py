"""Reward models through the user's command, end to end: published files, any ranks, models of
training here and of others, bad input.
"""

import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tiny
import torch
import transformers
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.eval.test_evaluate import HELD_OUT, SCRIPT, differences, on_two_ranks, write
from tests.launch.commands import ROOT, several

ROWS = [json.loads(line) for line in HELD_OUT]
LENGTH = ["--max_length", 400]
ONE_BATCH = ["--micro_tokens", 20000]  # of two ranks one has an empty batch
# RewardBench's columns (allenai/reward-bench, split filtered) and RewardBench 2's
# (allenai/reward-bench-2, split test).
REWARD_BENCH = pyarrow.schema(
    [
        *((name, pyarrow.string()) for name in ("prompt", "chosen", "chosen_model", "rejected")),
        *((name, pyarrow.string()) for name in ("rejected_model", "subset")),
        ("id", pyarrow.int64()),
    ]
)
STRINGS = pyarrow.list_(pyarrow.string())
REWARD_BENCH_2 = pyarrow.schema(
    [
        *((name, pyarrow.string()) for name in ("id", "prompt")),
        *((name, STRINGS) for name in ("chosen", "rejected")),
        *((name, pyarrow.int64()) for name in ("num_correct", "num_incorrect")),
        ("total_completions", pyarrow.int64()),
        ("models", STRINGS),
        ("subset", pyarrow.string()),
        ("additional_metadata", pyarrow.struct([("category", pyarrow.string())])),
    ]
)


def reward_bench():
    """Rows in RewardBench's form, one subset a section, and a row that is dropped."""
    subsets = ["alpacaeval-easy", "mt-bench-hard", "donotanswer", "math-prm", "hep-cpp"]
    rows = [
        row | {"subset": subsets[i % 5], "id": i, "chosen_model": "a", "rejected_model": "b"}
        for i, row in enumerate(ROWS[:20])
    ]
    return [*rows, rows[0] | {"rejected": rows[0]["chosen"], "id": 20}]


def reward_bench_2():
    """Rows in RewardBench 2's form: best of four, and prompts with many right answers."""
    others = [row["rejected"] for row in ROWS]
    rows = []
    for i, subset in enumerate(["Factuality", "Precise IF", "Math", "Safety", "Focus"] * 2):
        rows.append((str(i), ROWS[i]["prompt"], [ROWS[i]["chosen"]], others[i : i + 3], subset))
    for i in range(2):
        prompt, right = ROWS[20 + i]["prompt"], ROWS[20 + i]["chosen"]
        many = [right, f"{right} Yes.", f"Well: {right}"]
        rows.append((f"ref:{i}", prompt, [right], others[i : i + 4], "Ties"))
        rows.append((f"tied:{i}", f"{prompt} Say more.", many, others[i : i + 5], "Ties"))
    return [
        {
            **dict(zip(("id", "prompt", "chosen", "rejected", "subset"), row, strict=True)),
            "num_correct": len(row[2]),
            "num_incorrect": len(row[3]),
            "total_completions": len(row[2]) + len(row[3]),
            "models": ["a"] * (len(row[2]) + len(row[3])),
            "additional_metadata": {"category": None},
        }
        for row in rows
    ]


def report_of(folder):
    text = (folder / "report.json").read_text(encoding="utf-8")
    report = json.loads(text, parse_constant=lambda word: pytest.fail(word))
    assert report["run"].pop("seconds_scoring") > 0
    return report


def table(folder, name):
    return pyarrow.parquet.read_table(folder / f"{name}.parquet").to_pandas()


def foreign(folder, **config):
    """A reward model that training here did not write, with a tokenizer of its own."""
    tiny.make_score_model("qwen2", seed=3, **config).save_pretrained(folder)
    tiny.save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory, model_dir):
    """Reward models, and files in the benchmarks' published form."""
    folder = tmp_path_factory.mktemp("reward")
    for name, rows, schema in (
        ("rb", reward_bench(), REWARD_BENCH),
        ("rb2", reward_bench_2(), REWARD_BENCH_2),
    ):
        columns = pyarrow.Table.from_pylist(rows, schema=schema)
        pyarrow.parquet.write_table(columns, folder / f"{name}.parquet")
    foreign(folder / "foreign", pad_token_id=0)
    line = ["--model", model_dir, "--output", folder / "run", "--max_steps", 2, "--lr", "1e-2"]
    line += ["--batch_size", 8, "--max_length", 200, "--max_prompt_length", 100]
    ((code, _, err),) = several("launch/train_reward.py", [line], folder / "cache")
    assert code == "0", err[-3000:]
    return folder


def refusals(place, model_dir):
    """Bad input, each: arguments, exit code, what the one line says."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(place / "foreign")
    newline = tokenizer.encode("\n")[-1]  # ChatML's texts end in it
    ends_in_pad = foreign(place / "ends_in_pad", pad_token_id=newline)
    small = foreign(place / "small_vocabulary", vocab_size=500)
    two_labels = foreign(place / "two_labels")
    config = tiny.make_score_model("llama").config
    config.num_labels = 2
    two = transformers.AutoModelForSequenceClassification.from_config(config)
    two.save_pretrained(two_labels)
    other = ["--reward_model", place / "foreign"]
    empty = write(place / "empty.jsonl", '{"prompt": "a", "chosen": ["b"], "rejected": []}')
    same = write(place / "same.jsonl", '{"prompt": "a", "chosen": ["b"], "rejected": ["c", "b"]}')
    numbers = write(place / "numbers.jsonl", json.dumps(ROWS[0] | {"subset": 3}))
    too_long = {"prompt": "word " * 550, "chosen": "yes", "rejected": "no"}
    too_long = write(place / "long.jsonl", json.dumps(too_long))
    lengths = ["--max_length", 900, "--max_prompt_length", 600]
    shards = ["--ds_config", "ds_configs/frozen_zero3.json"]
    return [
        (["--by", "subset"], 2, "--by changes nothing without --reward_model"),
        ([*other, "--reference", model_dir], 2, "stands alone: pass --model, too"),
        ([*other, "--beta", "0.3"], 2, "--beta changes nothing where --reward_model stands alone"),
        (["--reward_model", place / "nowhere"], 2, "nowhere"),
        (["--reward_model", model_dir], 2, "is no reward model: it has no score.weight"),
        (["--reward_model", two_labels], 2, "it has 2 outputs, not 1"),
        (["--reward_model", small], 2, "they are not of one model"),
        (["--reward_model", ends_in_pad], 2, "texts end in the pad token"),
        ([*other, "--data", too_long, *lengths], 2, "512 positions: lower --max_length"),
        ([*other, *shards], 2, "a reward model stands whole on each"),
        ([*other, "--by", "subset"], 4, "no column 'subset'; found 'prompt', 'chosen'"),
        ([*other, "--by", "subset", "--data", numbers], 4, "holds 3, not a string"),
        ([*other, "--data", empty], 4, "rejected has no answer in it"),
        ([*other, "--data", same], 4, "chosen equals rejected"),
        ([*other, "--data", place / "none.parquet"], 4, "none.parquet"),
    ]


@pytest.fixture(scope="module")
def refused(place, model_dir):
    """[(case, how the command ended)] of `refusals`, filled by `runs`: one process does it all."""
    return []


@pytest.fixture(scope="module")
def runs(place, model_dir, refused):
    """Both benchmarks by a foreign model; pairs by the trained one, alone and beside a language
    model.
    """
    other = ["--reward_model", place / "foreign", *LENGTH, "--by", "subset"]
    own = ["--reward_model", place / "run/model"]
    lines = {
        "rb": [*other, "--data", place / "rb.parquet", "--max_dropped", 0.1],
        "rb2": [*other, "--data", place / "rb2.parquet", *ONE_BATCH],
        "packed": [*other, "--data", place / "rb2.parquet", "--layout", "packed"],
        "small": [*other, "--data", place / "rb2.parquet", "--micro_tokens", 1],
        "own": own,
        "padded": [*own, "--layout", "padded"],
        "both": [
            *[*own, "--model", model_dir, "--max_rows", 12, "--max_length", 400],
            *["--prompts", 2, "--max_new_tokens", 5],
        ],
    }
    cases = refusals(place, model_dir)
    commands = [[*line, "--output", place / name] for name, line in lines.items()]
    commands += [[*case[0], "--output", place / f"bad{i}"] for i, case in enumerate(cases)]
    done = several(SCRIPT, commands, place / "cache")
    for name, (code, _, err) in zip(lines, done, strict=False):
        assert code == "0", (name, err[-3000:])
    refused += zip(cases, done[len(lines) :], strict=True)
    return place


def alone(model, tokenizer, prompt, answer):
    """The plain way: the rendered text through the model's own class, in fp64."""
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        return float(model(input_ids=torch.tensor([ids])).logits), ids


@pytest.mark.parametrize("name", ["rb2", "packed", "small"])
def test_scores_are_those_of_each_rendered_text_alone(runs, name):
    auto = transformers.AutoModelForSequenceClassification
    model = auto.from_pretrained(runs / "foreign").double()
    tokenizer = transformers.AutoTokenizer.from_pretrained(runs / "foreign")
    answers, rows = table(runs / name, "answers"), reward_bench_2()
    assert len(answers) == sum(row["total_completions"] for row in rows)
    for number, of_row in answers.groupby("row"):
        row = rows[number]
        texts = [*row["chosen"], *row["rejected"]]
        assert of_row.chosen.sum() == row["num_correct"]
        for text, score in zip(texts, of_row.score, strict=True):
            exact, ids = alone(model, tokenizer, row["prompt"], text)
            assert len(ids) <= 400 and score == pytest.approx(exact, rel=1e-4, abs=1e-4)


def test_a_trained_model_is_scored_as_it_was_trained(runs):
    """Packed, with the lengths of its run, to the end of what the template renders; its own class
    gives the same.
    """
    report = report_of(runs / "own")
    chapter = report["rewards"]
    assert chapter["recipe"]["layout"] == "packed" and chapter["recipe"]["max_length"] == 200
    assert chapter["recipe"]["from"] == "run/run.json" and chapter["trained"]["steps"] == 2
    packed, padded = table(runs / "own", "rewards"), table(runs / "padded", "rewards")
    assert packed.chosen_score.tolist() == pytest.approx(padded.chosen_score.tolist(), abs=1e-4)
    assert report["run"]["judge"]["computed"] == "packed, as trained"
    assert "Classification" in report_of(runs / "padded")["run"]["judge"]["computed"]
    # what training found on the same pairs
    record = json.loads((runs / "run/run.json").read_text(encoding="utf-8"))
    last = record["evaluations"]["2"]
    found = chapter["preferences"]["model"]
    for name in ("rewards/accuracies", "rewards/margins", "rewards/chosen", "loss"):
        assert found[name]["value"] == pytest.approx(last[name], abs=1e-4), name


def test_the_report_adds_up_from_its_rows(runs):
    rows, chapter = table(runs / "rb", "rewards"), report_of(runs / "rb")["rewards"]
    model = chapter["preferences"]["model"]
    margin = rows.chosen_score - rows.rejected_score
    assert margin.tolist() == rows.margin.tolist()
    assert model["rewards/accuracies"]["value"] == (margin > 0).mean()
    assert model["rewards/margins"]["value"] == pytest.approx(margin.mean(), rel=1e-12)
    assert model["loss"]["value"] == pytest.approx(np.log1p(np.exp(-margin)).mean(), rel=1e-12)
    assert chapter["data"]["dropped"] == 1 and len(rows) == 20
    (dropped,) = (runs / "rb/dropped.jsonl").read_text().splitlines()
    assert "chosen equals rejected" in dropped
    # sections from subsets: of Reasoning's two here, math-prm counts 984 and hep-cpp 164
    by = {row["name"]: row["value"] for row in chapter["by"]}
    sections = {name: s["value"] for name, s in chapter["benchmark"]["sections"].items()}
    assert sections["Chat"] == by["alpacaeval-easy"] and sections["Safety"] == by["donotanswer"]
    reasoning = (984 * by["math-prm"] + 164 * by["hep-cpp"]) / 1148
    assert sections["Reasoning"] == pytest.approx(reasoning)
    score = chapter["benchmark"]["score"]["value"]
    assert score == pytest.approx(np.mean(list(sections.values())))


def test_reward_bench_2_as_published(runs):
    chapter, rows = report_of(runs / "rb2")["rewards"], table(runs / "rb2", "rewards")
    answers = table(runs / "rb2", "answers")
    best = answers.loc[answers.groupby("row").score.idxmax()].set_index("row").chosen
    sections = chapter["benchmark"]["sections"]
    for name in ("Factuality", "Precise IF", "Math", "Safety", "Focus"):
        numbers = rows.row[rows.by == name]
        assert sections[name]["value"] == best[numbers].mean()
    assert set(sections["Ties"]["parts"]) >= {"accuracy_tied", "accuracy_ref", "preferred_hard"}
    score = chapter["benchmark"]["score"]["value"]
    assert score == pytest.approx(np.mean([s["value"] for s in sections.values()]))
    assert "RewardBench 2" in (runs / "rb2/report.md").read_text(encoding="utf-8")


def test_two_ranks_write_the_same_digits(runs):
    line = ["--reward_model", runs / "foreign", *LENGTH, "--by", "subset"]
    line += ["--data", runs / "rb2.parquet", *ONE_BATCH, "--output", runs / "two"]
    on_two_ranks("deepspeed", line, runs / "cache")
    one, two = report_of(runs / "rb2"), report_of(runs / "two")
    assert two["run"]["judge"]["hardware"].pop("world") == 2
    assert one["run"]["judge"]["hardware"].pop("world") == 1
    assert differences(one, two) == []
    for name in ("rewards", "answers"):
        first, second = (
            pyarrow.parquet.read_table(runs / ranks / f"{name}.parquet") for ranks in ("rb2", "two")
        )
        assert first.equals(second) and first.num_rows > 0, name


@pytest.mark.slow
def test_two_ranks_score_a_trained_model_alike(runs):
    line = ["--reward_model", runs / "run/model", "--output", runs / "two_own"]
    on_two_ranks("torchrun", line, runs / "cache")
    first, second = (
        pyarrow.parquet.read_table(runs / name / "answers.parquet") for name in ("own", "two_own")
    )
    assert first.equals(second) and first.num_rows == 128


def test_beside_a_language_model(runs, model_dir):
    """The language model's chapters as ever, its answers judged, and the reward model's chapter."""
    report = report_of(runs / "both")
    assert report["preferences"]["pairs"] == report["rewards"]["preferences"]["rows"] == 12
    assert report["generations"]["reward_model"]["name"] == "run/model"
    rewards = report["generations"]["greedy"]["model"]["reward"]
    rows = table(runs / "both", "generations")
    assert rewards["value"] == pytest.approx(rows["greedy/model/reward"].mean())
    page = (runs / "both/report.md").read_text(encoding="utf-8")
    assert "## Preferences" in page and "As a reward model" in page
    # alone, no language model is there to be evaluated
    alone = report_of(runs / "own")
    assert "preferences" not in alone and "generations" not in alone
    assert not (runs / "own/texts.parquet").exists()


def test_figures_board_and_card(runs):
    pixels = np.asarray(Image.open(runs / "rb/figures/rewards.png").convert("RGBA"))
    assert pixels.shape[1] >= 900 and (pixels[..., 3] == 255).all()
    brightness = pixels[..., :3].mean(-1)
    assert (brightness > 250).mean() > 0.4 and (brightness < 60).mean() > 0.001
    events = EventAccumulator(str(runs / "own/tensorboard"))
    events.Reload()
    tags, model = events.Tags(), report_of(runs / "own")["rewards"]["preferences"]["model"]
    (event,) = events.Scalars("eval/rewards/accuracies")
    assert event.step == 2 and event.value == pytest.approx(model["rewards/accuracies"]["value"])
    assert {"evaluation_calibration/ece", "evaluation_baselines/bag_of_words"} <= set(
        tags["scalars"]
    )
    assert {"eval/histogram/scores_chosen", "eval/histogram/scores_rejected"} <= set(
        tags["histograms"]
    )
    assert "eval/rewards" in tags["images"] and "eval/pr/chosen_or_rejected" in tags["tensors"]
    card = (runs / "run/model/README.md").read_text(encoding="utf-8")
    assert "figures/rewards.png" in card and "bag of words" in card
    assert "type: text-classification" in card and "type: text-generation" not in card
    assert (runs / "run/model/figures/rewards.png").is_file()
    assert not (runs / "foreign/README.md").exists()  # training did not write that directory


def test_nothing_that_others_read_names_a_place_on_this_machine(runs):
    for text in (
        (runs / "own/report.json").read_text(),
        (runs / "own/report.md").read_text(),
        (runs / "run/model/README.md").read_text(),
    ):
        for folder in (runs, runs.parent, ROOT):
            assert str(folder) not in text


def test_bad_input_is_answered_in_one_line(runs, refused):
    """No traceback anywhere, and nothing stands in the way."""
    assert len(refused) == 15
    for (extra, code, words), (found, out, err) in refused:
        said = [line for line in err.splitlines() if line.startswith("error: ")]
        assert found == str(code), (extra, found, said or err[-2000:])
        assert len(said) == 1 and words in said[0], (extra, said, err[-2000:])
        assert "Traceback" not in out + err
    assert not list(runs.glob("bad*/report.json"))
    assert not list(runs.glob("bad*/run.json"))
