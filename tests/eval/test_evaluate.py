"""The user's commands, end to end, with tiny models: any ranks and rows, files that open, bad
input.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import tiny
import torch
import transformers
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.launch.commands import ROOT, free_port, launched, several

SCRIPT = "eval/evaluate.py"
HELD_OUT = (ROOT / "train/data/builtin/held_out.jsonl").read_text(encoding="utf-8").splitlines()
LENGTH = ["--max_length", 512]  # the tiny model's positions
SMALL = ["--prompts", 3, "--max_new_tokens", 6]


@pytest.fixture(scope="module")
def place(tmp_path_factory, model_dir):
    """A folder with a trained model, its start, pairs with a broken row, texts with blank and
    one-token rows.
    """
    folder = tmp_path_factory.mktemp("evaluate")
    with_control_token = json.dumps({"prompt": "Say <|im_end|>", "chosen": "a", "rejected": "b"})
    rows = [*HELD_OUT[:24], with_control_token, *HELD_OUT[:6]]
    write(folder / "pairs.jsonl", "\n".join(rows))
    texts = ["", "a", "The river Ouse rises in the hills.", "  "]
    texts += ["Tin melts at 232 degrees. " * 20, "Ash is a hard wood."]
    write(folder / "texts.jsonl", "\n".join(json.dumps({"text": text}) for text in texts))
    line = ["--model", model_dir, "--output", folder / "run", "--max_steps", 2]
    line += ["--batch_size", 8, "--lr", "1e-2", "--beta", 0.4]
    line += ["--max_length", 200, "--max_prompt_length", 100]
    ((code, _, err),) = several("launch/train_dpo.py", [line], folder / "cache")
    assert code == "0", err[-3000:]
    return folder


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def load(folder):
    """report.json without what may differ: the machine and its clock."""
    report = json.loads(
        (folder / "report.json").read_text(encoding="utf-8"),
        parse_constant=lambda word: pytest.fail(word),
    )
    assert report.pop("run")["seconds_scoring"] > 0
    return report


def differences(a, b, path=""):
    """(place, value, value) of every leaf in which two reports differ."""
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return [leaf for key in a for leaf in differences(a[key], b[key], f"{path}/{key}")]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return [
            leaf
            for i, both in enumerate(zip(a, b, strict=True))
            for leaf in differences(*both, f"{path}[{i}]")
        ]
    return [] if a == b else [(path, a, b)]


def on_two_ranks(launcher, line, cache):
    """Run an evaluation under `launcher`, deepspeed or torchrun; it must succeed."""
    launchers = {
        "deepspeed": ["--master_port", free_port(), "--num_accelerators", 2],
        "torchrun": ["--master_port", free_port(), "--nproc_per_node", 2],
    }
    done = launched([launcher, *launchers[launcher], SCRIPT, *line], cache)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def runs(place, model_dir):
    """One evaluation by one rank and by two, in batches of other sizes, without a reference, of a
    model against itself.
    """
    texts = ["--data", place / "pairs.jsonl", "--ood", place / "texts.jsonl"]
    common = [*texts, *SMALL]
    pair = ["--model", place / "run/model", "--reference", model_dir, *common]
    lines = {
        "one": [*pair, "--micro_tokens", 700],
        "512": [*pair, "--micro_tokens", 512],
        "8192": [*pair, "--micro_tokens", 8192],
        "padded": [*pair, "--layout", "padded"],
        "alone": ["--model", model_dir, *texts, *LENGTH, "--prompts", 0],
        "itself": ["--model", model_dir, "--reference", model_dir, *common, *LENGTH, "--beta", 2],
        "bf16": [*pair, "--precision", "bf16", "--max_rows", 5],
    }
    commands = [[*line, "--output", place / name] for name, line in lines.items()]
    done = several(SCRIPT, commands, place / "cache")
    for name, (code, _, err) in zip(lines, done, strict=True):
        assert code == "0", (name, err[-3000:])
    on_two_ranks("deepspeed", [*lines["one"], "--output", place / "two"], place / "cache")
    return place


def test_two_ranks_write_the_same_digits(runs):
    assert differences(load(runs / "one"), load(runs / "two")) == []
    for name in ("pairs", "texts", "generations"):
        one, two = (
            pyarrow.parquet.read_table(runs / ranks / f"{name}.parquet") for ranks in ("one", "two")
        )
        assert one.equals(two) and one.num_rows > 0, name


@pytest.mark.slow
def test_torchrun_writes_the_same_digits(runs, model_dir):
    line = ["--model", runs / "run/model", "--reference", model_dir]
    line += ["--data", runs / "pairs.jsonl", "--ood", runs / "texts.jsonl", *SMALL]
    line += ["--micro_tokens", 700, "--output", runs / "torchrun"]
    on_two_ranks("torchrun", line, runs / "cache")
    assert json.loads((runs / "torchrun/report.json").read_text())["run"]["hardware"]["world"] == 2
    assert differences(load(runs / "one"), load(runs / "torchrun")) == []


def test_other_token_budgets_change_no_more_than_rounding(runs):
    small, large = load(runs / "512"), load(runs / "8192")
    for where, a, b in differences(small, large):
        assert a == pytest.approx(b, rel=1e-5, abs=1e-7), where
    rows = [
        pyarrow.parquet.read_table(runs / name / "pairs.parquet")["row"].to_pylist()
        for name in ("512", "8192")
    ]
    # every row once; 24 has a control token
    assert rows[0] == rows[1] == [*range(24), *range(25, 31)]
    padded = load(runs / "padded")
    losses = [report["preferences"]["model"]["loss"]["value"] for report in (padded, small)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_per_row_values_are_those_of_one_sequence_alone(runs):
    """The plain way: transformers' own forward in fp64, full logits, each prompt and answer by
    itself.
    """
    model = transformers.AutoModelForCausalLM.from_pretrained(runs / "run/model").double()
    tokenizer = transformers.AutoTokenizer.from_pretrained(runs / "run/model")
    rows = pyarrow.parquet.read_table(runs / "one/pairs.parquet").to_pylist()

    def alone(prompt_ids, ids):
        whole = torch.tensor([prompt_ids + ids])
        with torch.no_grad():
            logps = model(whole).logits.log_softmax(-1)[0, :-1]
        return float(logps.gather(1, whole[0, 1:, None])[max(len(prompt_ids) - 1, 0) :].sum())

    def encode(text):
        return tokenizer.encode(text, add_special_tokens=False)

    for row in rows[:3]:
        pair = json.loads(HELD_OUT[row["row"]])
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": pair["prompt"]}],
            tokenize=False,
            add_generation_prompt=True,
        )
        prompt_ids = encode(prompt)[-100:]
        for side in ("chosen", "rejected"):
            ids = encode(pair[side] + "<|im_end|>")[: 200 - len(prompt_ids)]
            assert row[f"{side}_tokens"] == len(ids)
            assert row[f"{side}_logp"] == pytest.approx(alone(prompt_ids, ids), rel=1e-5)
    text = pyarrow.parquet.read_table(runs / "one/texts.parquet").to_pylist()[0]
    ids = encode("The river Ouse rises in the hills.")
    assert text["row"] == 2 and text["tokens"] == len(ids) - 1
    assert text["logp"] == pytest.approx(alone([], ids), rel=1e-5)


def test_report_adds_up_from_its_rows(runs):
    report = load(runs / "one")
    rows = pyarrow.parquet.read_table(runs / "one/pairs.parquet").to_pandas()
    model = report["preferences"]["model"]
    chosen = rows.chosen_logp - rows.ref_chosen_logp
    rejected = rows.rejected_logp - rows.ref_rejected_logp
    margin = 0.4 * (chosen - rejected)
    assert model["rewards/margins"]["value"] == pytest.approx(margin.mean(), rel=1e-12)
    assert model["rewards/accuracies"]["value"] == (margin > 0).mean()
    assert model["loss"]["value"] == pytest.approx(np.log1p(np.exp(-margin)).mean(), rel=1e-12)
    # six rows stand twice
    assert model["rewards/margins"]["n"] == 30 and model["rewards/margins"]["prompts"] == 24
    low, high = model["rewards/margins"]["interval"]
    assert low < model["rewards/margins"]["value"] < high
    texts = pyarrow.parquet.read_table(runs / "one/texts.parquet").to_pandas()
    perplexity = report["distribution"]["model"]["out"]["perplexity"]["value"]
    assert perplexity == pytest.approx(np.exp(-texts.logp.sum() / texts.tokens.sum()), rel=1e-12)


def test_settings_come_from_the_models_run_and_flags_override(runs):
    report = load(runs / "one")
    recipe = report["recipe"]
    assert recipe["beta"] == 0.4 and recipe["layout"] == "packed"
    assert recipe["max_length"] == 200 and recipe["max_prompt_length"] == 100
    assert recipe["from"] == "run/run.json" and report["ood"]["truncated"] == 1
    assert report["trained"] == {
        "from": "llama",
        "loss": "sigmoid",
        "beta": 0.4,
        "lr": 0.01,
        "steps": 2,
        "pairs": 192,
        "batch_size": 8,
        "data": "zeropref's built-in train.jsonl",
        "reference": "llama",
    }
    assert load(runs / "padded")["recipe"]["layout"] == "padded"
    other = load(runs / "itself")["recipe"]
    assert (other["beta"], other["max_length"], other["from"]) == (2, 512, None)


def test_dropped_rows_are_listed(runs):
    dropped = [json.loads(line) for line in (runs / "one/dropped.jsonl").read_text().splitlines()]
    places = [(row["split"], row["row"]) for row in dropped]
    assert places == [("data", 24), ("ood", 0), ("ood", 3), ("ood", 1)]
    assert "<|im_end|>" in dropped[0]["reason"] and "one token" in dropped[3]["reason"]
    assert load(runs / "one")["ood"]["dropped"] == 3


def test_a_model_against_itself_is_unchanged_and_alone_has_no_rewards(runs):
    itself, alone = load(runs / "itself"), load(runs / "alone")
    model = itself["preferences"]["model"]
    assert itself["verdict"]["word"] == "unchanged"
    assert model["rewards/margins"]["interval"] == [0, 0]
    assert model["rewards/accuracies"]["value"] == 0.5
    assert alone["verdict"]["word"] == "not compared" and alone["reference"] is None
    assert "reference" not in alone["distribution"]
    assert alone["generations"] == {"skipped": "--prompts is 0"}
    said = (runs / "alone/report.md").read_text()
    assert "Without a reference, margins are differences of log-probabilities, in nats." in said
    assert not (runs / "alone/generations.parquet").exists()


def test_bf16_is_near_fp32(runs):
    rough, exact = (
        pyarrow.parquet.read_table(runs / name / "pairs.parquet").to_pandas()
        for name in ("bf16", "one")
    )
    assert len(rough) == 5 and rough.chosen_logp.tolist() != exact.chosen_logp[:5].tolist()
    assert rough.chosen_logp.tolist() == pytest.approx(exact.chosen_logp[:5].tolist(), rel=0.02)


def test_figures_are_opaque_and_have_both_inks(runs):
    for name in ("preferences", "distribution"):
        pixels = np.asarray(Image.open(runs / f"one/figures/{name}.png").convert("RGBA"))
        # a white ground of its own: legible on any page
        assert pixels.shape[1] >= 900 and (pixels[..., 3] == 255).all()
        brightness = pixels[..., :3].mean(-1)
        assert (brightness > 250).mean() > 0.4 and (brightness < 60).mean() > 0.001
        assert f"figures/{name}.png" in (runs / "one/report.md").read_text()


def test_tensorboard_has_scalars_histograms_curves_texts_and_layout(runs):
    events = EventAccumulator(str(runs / "one/tensorboard"))
    events.Reload()
    tags, report = events.Tags(), load(runs / "one")
    for name in ("rewards/margins", "rewards/accuracies", "loss", "logps/chosen_per_token"):
        (event,) = events.Scalars(f"eval/{name}")
        value = report["preferences"]["model"][name]["value"]
        assert event.step == 2 and event.value == pytest.approx(value, rel=1e-6)
    assert {
        "evaluation_distribution/model/out/perplexity",
        "evaluation_baselines/bag_of_words",
        "evaluation_reference/logps/chosen",
    } <= set(tags["scalars"])
    assert {
        "eval/histogram/margins",
        "eval/histogram/reference/logps_chosen",
        "eval/histogram/model/logp_per_token_out",
        "evaluation_generations/histogram/sampled/model/length",
    } <= set(tags["histograms"])
    assert {"eval/preferences", "eval/distribution"} <= set(tags["images"])
    tensors = set(tags["tensors"])
    assert {
        "eval/pr/chosen_or_rejected",
        "eval/pr/in_or_out/model",
        "eval/generations/greedy/text_summary",
        "eval/generations/sampled/text_summary",
        "eval/report/text_summary",
    } <= tensors
    (layout,) = (
        tensor
        for tag in tensors
        if tag.startswith("custom_scalars")
        for tensor in events.Tensors(tag)
    )
    text = layout.tensor_proto.string_val[0]
    assert all(f"{split}/rewards/margins".encode() in text for split in ("train", "val", "eval"))


@pytest.mark.slow
def test_a_card_that_cannot_be_written_costs_itself_alone(place, model_dir, tmp_path):
    """In somebody else's folder, here one without room for figures; a head that is no YAML."""
    lines, cards = [], {}
    for name in ("no room", "no yaml"):
        run = tmp_path / name
        shutil.copytree(place / "run", run)
        card = run / "model/README.md"
        if name == "no room":
            shutil.rmtree(run / "model/figures", ignore_errors=True)  # another test's evaluation
            write(run / "model/figures", "a file")
        else:
            card.write_text(card.read_text().replace("tags:", "tags: [", 1))
        cards[card] = card.read_bytes()
        line = ["--model", run / "model", "--reference", model_dir, "--data", place / "pairs.jsonl"]
        lines.append([*line, *LENGTH, "--max_rows", 4, "--prompts", 0, "--output", run / "eval"])
    for line, (code, out, err) in zip(
        lines, several(SCRIPT, lines, tmp_path / "cache"), strict=True
    ):
        assert code == "0" and "Traceback" not in out + err, err[-2000:]
        said = [text for text in out.splitlines() if " has no new card: " in text]
        assert len(said) == 1 and said[0].endswith("--card false leaves the card alone")
        folder = Path(line[-1])
        assert (folder / "status").read_text() == "finished\n" and load(folder)["preferences"]
    assert cards == {card: card.read_bytes() for card in cards}


def test_the_card_of_a_trained_model_has_the_results(runs, model_dir):
    card = (runs / "run/model/README.md").read_text(encoding="utf-8")
    assert "reward accuracy" in card.lower() and "figures/preferences.png" in card
    assert not (model_dir / "README.md").exists()  # training did not write that directory


def test_nothing_that_others_read_names_a_place_on_this_machine(runs):
    """Model directories, data, flags: by their last components, in the report, the card and on
    TensorBoard.
    """
    events = EventAccumulator(str(runs / "one/tensorboard"))
    events.Reload()
    (page,) = events.Tensors("eval/report/text_summary")
    texts = {
        "report.json": (runs / "one/report.json").read_text(),
        "report.md": (runs / "one/report.md").read_text(),
        "card": (runs / "run/model/README.md").read_text(),
        "page": str(page.tensor_proto.string_val),
    }
    for name, text in texts.items():
        for folder in (runs, runs.parent, Path.home(), ROOT):
            assert str(folder) not in text, name
    report = json.loads(texts["report.json"])
    assert report["model"] == "run/model" and report["reference"] == "llama"
    assert report["data"]["sources"] == ["pairs.jsonl"]
    assert report["ood"]["sources"] == ["texts.jsonl"]
    flags = report["run"]["flags"]
    assert flags["data"] == ["pairs.jsonl"] and flags["model"] == "run/model"
    assert "output" not in flags
    own_record = json.loads((runs / "one/run.json").read_text())  # this names places
    assert own_record["flags"]["data"] == [str(runs / "pairs.jsonl")]


def test_the_same_command_again_says_so(runs, model_dir):
    line = ["--model", model_dir, "--data", runs / "pairs.jsonl", "--ood", runs / "texts.jsonl"]
    line += [*LENGTH, "--prompts", 0, "--output", runs / "alone"]
    again, other = several(SCRIPT, [line, [*line, "--beta", 3]], runs / "cache")
    code, out, _ = again
    assert code == "0" and "finished" in out
    code, _, err = other
    assert code == "2" and "holds another run" in err


def test_bad_input_is_answered_in_one_line(place, model_dir):
    """Each row: arguments, exit code, what the line says. No traceback anywhere."""

    def file(name, text):
        return write(place / name, text)

    hollow = without_weights(model_dir, place / "hollow")
    other_token = other_tokenizer(model_dir, place / "other", "the")  # in every text
    other_order = other_merges(model_dir, place / "merges")
    nowhere = place / "nowhere"
    to_shards = ["--ds_config", "ds_configs/frozen_zero3.json"]
    equal_sides = '{"prompt": "a", "chosen": "b", "rejected": "b"}'
    cases = [
        (["--modell", "x"], 2, "did you mean --model"),
        (["--beta", "0"], 2, "--beta is a finite number above 0"),
        (["--temperature", "-1"], 2, "--temperature is at least 0"),
        (["--model", hollow], 2, "cannot load a causal language model"),
        (["--model", nowhere], 2, "nowhere"),
        (["--reference", other_token], 2, "the tokenizer of --reference"),
        (["--reference", other_order], 2, "in the other): the two cannot be compared"),
        (["--reference", nowhere], 2, "nowhere"),
        (["--reward_model", model_dir], 2, "is no reward model"),
        (["--reward_model", nowhere], 2, "nowhere"),
        (["--reward_model", model_dir, *to_shards], 2, "stands whole on each"),
        (["--max_new_tokens", 500], 2, "exceed the model's 512 positions: lower --max_new_tokens"),
        (["--data", file("empty.jsonl", "")], 4, "no rows in it"),
        (["--data", place / "none.jsonl"], 4, "none.jsonl"),
        (["--data", place / "texts.jsonl"], 4, "no column"),
        (
            ["--data", file("half.jsonl", f"{HELD_OUT[0]}\n{equal_sides}\n")],
            4,
            "chosen equals rejected",
        ),
        (["--ood", file("empty_texts.jsonl", "")], 4, "no rows in it"),
        (["--ood", file("empty.txt", " \n\n")], 4, "no text in it"),
        (["--ood", file("latin.txt", b"caf\xe9 noir")], 4, "not UTF-8 at byte 3"),
        (["--ood", file("blank.jsonl", '{"text": "  "}\n{"text": ""}\n')], 4, "empty text"),
        (["--ood", file("single.jsonl", '{"text": "a"}\n')], 4, "no text of two tokens or more"),
        (["--ood", place / "none.txt"], 4, "none.txt"),
        (["--model", damaged_run(model_dir, place / "damaged")], 2, "run.json is damaged"),
        (["--loss", "sigmiod"], 2, "none of: sigmoid"),
        (["--ds_config", place / "none.json"], 2, "does not exist"),
    ]
    common = ["--model", model_dir, *LENGTH]
    common += ["--data", place / "pairs.jsonl", "--ood", place / "texts.jsonl"]
    lines = [
        [*common, "--output", place / f"bad{i}", *extra] for i, (extra, _, _) in enumerate(cases)
    ]
    done = several(SCRIPT, lines, place / "cache")
    for (extra, code, words), (found, out, err) in zip(cases, done, strict=True):
        assert found == str(code), (extra, found, err[-2000:])
        said = [line for line in err.splitlines() if line.startswith("error: ")]
        assert len(said) == 1 and words in said[0], (extra, err[-2000:])
        assert "Traceback" not in out + err
    # refused at the door: nothing was scored, nothing stands in the way
    assert not list(place.glob("bad*/report.json"))
    assert not list(place.glob("bad*/run.json"))


@pytest.mark.slow
def test_one_row_a_text_file_and_a_bound_on_tokens(place, model_dir):
    words = "Iron rusts in wet air.\n\nLead does not, or hardly.\r\n\r\nGold never.\n"
    paragraphs = write(place / "words.txt", words)
    one_pair = write(place / "one.jsonl", HELD_OUT[3])
    one_text = write(place / "one_text.jsonl", '{"text": "Snow is ice."}')
    few = ["--data", place / "pairs.jsonl", "--max_rows", 2, "--ood", paragraphs]
    lines = {
        "single": ["--data", one_pair, "--ood", one_text, *SMALL, "--reference", model_dir],
        "paragraphs": [*few, "--prompts", 0],
        "tokens": [*few, "--prompts", 0, "--ood_tokens", 15, "--max_rows", 9],
    }
    commands = [
        ["--model", model_dir, *LENGTH, *line, "--output", place / f"few_{name}"]
        for name, line in lines.items()
    ]
    done = several(SCRIPT, commands, place / "cache")
    for name, (code, _, err) in zip(lines, done, strict=True):
        assert code == "0", (name, err[-3000:])
    single = load(place / "few_single")
    assert single["preferences"]["pairs"] == 1
    assert single["preferences"]["model"]["loss"]["interval"] is None
    assert single["baselines"]["bag_of_words"]["value"] is None
    assert single["distribution"]["model"]["by_text"]["auroc"]["interval"] is None
    assert load(place / "few_paragraphs")["ood"]["groups"] == 2  # the first two, as of the pairs
    lengths = pyarrow.parquet.read_table(place / "few_tokens/texts.parquet")["tokens"].to_pylist()
    assert sum(lengths) + len(lengths) == 15  # scored tokens, and one a text that is not


def test_sharded_models_are_scored_alike_and_write_nothing(place, model_dir, runs):
    line = ["--model", place / "run/model", "--reference", model_dir]
    line += ["--data", place / "pairs.jsonl", "--ood", place / "texts.jsonl", *SMALL]
    line += ["--ds_config", "ds_configs/frozen_zero3.json", "--micro_tokens", 700]
    on_two_ranks("deepspeed", [*line, "--output", place / "sharded"], place / "cache")
    sharded, whole = load(place / "sharded"), load(runs / "one")
    assert "shards the models" in sharded["generations"]["skipped"]
    losses = [report["preferences"]["model"]["loss"]["value"] for report in (sharded, whole)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def without_weights(start, folder):
    transformers.AutoTokenizer.from_pretrained(start).save_pretrained(folder)
    transformers.AutoConfig.from_pretrained(start).save_pretrained(folder)
    return folder


def other_tokenizer(start, folder, token):
    tiny.make_model(vocab_size=tiny.VOCAB + 8).save_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(start)
    tokenizer.add_tokens([token])
    tokenizer.save_pretrained(folder)
    return folder


def other_merges(start, folder):
    """The same vocabulary, but words are put together in the opposite order."""
    tiny.make_model().save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(start).save_pretrained(folder)
    core = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    core["model"]["merges"].reverse()
    write(folder / "tokenizer.json", json.dumps(core))
    return folder


def damaged_run(start, folder):
    folder.mkdir()
    for file in Path(start).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    write(folder / "run.json", '{"flags": ')
    return folder
