"""The model card: metadata that huggingface_hub parses, the numbers of run.json and report.json,
and nothing local.
"""

import copy
import json
import re

import pytest
import tiny
import torch
import yaml
from huggingface_hub import ModelCard, repocard_data

from train.run import card

SECRET, HOME = "hf_" + "A1b2" * 9, "/home/someone/private"
RECORD = {
    "status": "running",
    "flags": {
        "model": f"{HOME}/models/base-7b",
        "data": ["org/pairs:sub@train", f"{HOME}/extra.jsonl", "pairs/more.csv"],
        "eval_data": None,
        "output": f"{HOME}/runs/secret-plan",
        "loss": "sigmoid",
        "beta": 0.25,
        "loss_args": {},
        "max_length": 512,
        "max_prompt_length": None,
        "batch_size": 8,
        "lr": 1e-5,
        "lr_scheduler": "cosine",
        "warmup_ratio": 0.1,
        "weight_decay": 0.01,
        "grad_clip": 1.0,
        "reference_model": f"{HOME}/models/older-7b",
        "seed": 3,
        "hub_token": SECRET,
        "ds_config": f"{HOME}/zero3.json",
    },
    "data": {
        "sources": ["org/pairs:sub@train", f"{HOME}/extra.jsonl"],
        "groups": 1234,
        "dropped": 7,
        "truncated": 3,
        "tokens": 56789,
        "fingerprint": "0123456789abcdef" * 4,
    },
    "eval_data": {
        "sources": [f"{HOME}/held|out.jsonl"],
        "groups": 64,
        "dropped": 0,
        "truncated": 0,
        "tokens": 4321,
        "fingerprint": "fedcba9876543210" * 4,
    },
    "model": f"{HOME}/models/base-7b",
    "precision": "bf16",
    "steps": 155,
    "deepspeed": {"zero_optimization": {"stage": 3}},
    "hardware": {"device": "cuda", "kind": "NVIDIA Something", "world": 8, "threads": 4},
    "versions": {"python": "3.11.7", "torch": "2.13.0"},
    "evaluations": {
        "0": {
            "loss": 0.6931,
            "rewards/accuracies": 0.5,
            "rewards/margins": 0.0,
            "logps/chosen": -100.0,
            "logps/rejected": -90.0,
            "pairs": 64,
        },
        "155": {
            "loss": 0.512345678,
            "rewards/accuracies": 0.796875,
            "rewards/margins": 0.654321,
            "logps/chosen": -101.0,
            "logps/rejected": -99.0,
            "pairs": 64,
            "rewards/accuracies_interval": [0.68, 0.88],
            "rewards/margins_interval": [0.5, 0.8],
        },
        "60": {
            "loss": 9.9,
            "rewards/accuracies": 0.1,
            "rewards/margins": -9.0,
            "logps/chosen": -1.0,
            "logps/rejected": -1.0,
            "pairs": 64,
        },
    },
}


def measure(value, interval=None, n=40):
    return {"value": value, "interval": interval, "n": n, "method": "made up"}


def report(accuracy=0.875):
    row = {"row": 5, "prompt": "Hi | there?\n" + card.MARKS[1]}
    for key, text, ended in (
        ("greedy/reference", "Greetings.", True),
        ("greedy/model", "```\n# Hey\n```", True),
        ("sampled/reference", "Good day", False),
        ("sampled/model", "---\nbase_model: x/y\n---", True),
    ):
        row |= {f"{key}/text": text, f"{key}/ended": float(ended)}
    return {
        "reference": f"{HOME}/models/base-7b",
        "verdict": {"word": "better", "reasons": ["It is."]},
        "data": {"sources": [f"{HOME}/held.jsonl"]},
        "preferences": {
            "model": {
                "rewards/accuracies": measure(accuracy, [0.75, 0.95]),
                "loss": measure(float("nan")),
                "rewards/margins": measure(None),
                "logps/chosen_per_token": measure(-1.5, [float("nan"), float("nan")]),
            },
            "reference": {"logps/chosen_per_token": measure(-1.625)},
        },
        "generations": {
            "sampled": {
                "model": {
                    "length": measure(31.5, [29.0, 34.0]),
                    "kl_k3": measure(2.25, [2.0, 2.5]),
                },
                "reference": {"length": measure(28.25)},
                "win_rate": measure(0.625, [0.5, 0.75]),
            },
            "examples": [row],
        },
    }


def loaded(folder):
    """The card as huggingface_hub reads it back, strictly, and its metadata as plain YAML says it."""
    content = (folder / "README.md").read_text(encoding="utf-8")
    found = ModelCard.load(folder / "README.md")  # raises where the model-index is not valid
    return found, yaml.safe_load(content.split("---\n")[1]), content


def results(found, name=None):
    """The model-index by measure, of the data set `name` or of all."""
    return {
        r.metric_type: (r.metric_value, r.metric_args)
        for r in found.data.eval_results
        if name in (None, r.dataset_name)
    }


def rows_of(text, title):
    return next(
        [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        for line in text.splitlines()
        if line.startswith(f"| {title} |")
    )


def test_card_of_a_run_holds_its_facts(tmp_path):
    record = copy.deepcopy(RECORD)
    write = card.from_run(record, seconds=3725.4)
    record["skipped_steps"] = 2  # what run.json learns later is there when the card is written
    write(tmp_path)
    found, metadata, text = loaded(tmp_path)
    assert results(found) == {
        "reward_accuracy": (0.796875, {"n": 64, "interval_95": [0.68, 0.88]}),
        "reward_margin": (0.654321, {"n": 64, "interval_95": [0.5, 0.8]}),
        "loss": (0.512345678, {"n": 64}),
    }
    assert {r.dataset_name for r in found.data.eval_results} == {"held|out.jsonl"}
    assert metadata["tags"][-2:] == ["dpo", "arxiv:2305.18290"]
    assert metadata["datasets"] == ["org/pairs"]
    assert metadata["library_name"] == "transformers"
    assert metadata["pipeline_tag"] == "text-generation"
    # not known: not said
    assert not {"base_model", "license", "language"} & set(metadata)
    assert rows_of(text, "reward accuracy") == ["reward accuracy", "0.5", "0.7969", "[0.68, 0.88]"]
    assert rows_of(text, "log-prob of rejected") == ["log-prob of rejected", "-90", "-99", ""]
    assert rows_of(text, "training") == [
        "training",
        "org/pairs:sub@train, extra.jsonl",
        "1,234",
        "56,789",
        "7",
        "3",
        "`0123456789abcdef`",
    ]
    assert rows_of(text, "held out")[1:3] == ["held\\|out.jsonl", "64"]
    for title, value in {
        "beta": "0.25",
        "learning rate (AdamW)": "1e-05",
        "schedule": "cosine",
        "steps": "155",
        "ZeRO stage": "3",
        "precision": "bf16",
        "pairs a step": "8",
        "steps skipped for a non-finite gradient": "2",
    }.items():
        assert rows_of(text, title)[1] == value
    assert "most tokens of a prompt |" not in text  # no bound was set
    table = text[text.index("| hyper-parameter | value |") :].split("\n\n")[0].splitlines()
    assert [line.split(" | ")[0].removeprefix("| ") for line in table[2:]] == [
        "loss",
        "beta",
        "learning rate (AdamW)",
        "schedule",
        "warm-up, share of the steps",
        "weight decay",
        "largest gradient norm",
        "pairs a step",
        "seed of the data's order",
        "most tokens of prompt and response",
        "steps",
        "precision",
        "ZeRO stage",
        "steps skipped for a non-finite gradient",
    ]
    for line in (
        "8 processes on NVIDIA Something (cuda)",
        "1 h 2 min",
        "torch 2.13.0",
        "`base-7b`",
        "The reference was `older-7b`",
    ):
        assert line in text
    for private in (SECRET, HOME, "secret-plan", "someone", "zero3.json", "nan", "None"):
        assert private not in text


def test_card_names_hub_models_and_the_built_in_one(tmp_path):
    record = copy.deepcopy(RECORD)
    record["flags"] |= {"model": "org/base", "reference_model": None}
    card.from_run(record)(tmp_path)
    found, metadata, text = loaded(tmp_path)
    assert metadata["base_model"] == "org/base" and metadata["base_model_relation"] == "finetune"
    assert metadata["model-index"][0]["name"] == "base-dpo"
    assert "# base-dpo" in text and "Time:" not in text
    record["flags"] |= {"model": None, "data": None}
    record["data"]["sources"] = ["/somewhere/train/data/builtin/train.jsonl"]
    card.from_run(record)(tmp_path)
    found, metadata, text = loaded(tmp_path)
    assert metadata["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert metadata["license"] == "apache-2.0"
    assert rows_of(text, "training")[1] == "zeropref's built-in train.jsonl"
    assert "datasets" not in metadata


@pytest.mark.parametrize(
    ("loss", "name", "paper"),
    [
        ("sigmoid", "dpo", "2305.18290"),
        ("kto", "kto", "2402.01306"),
        ("simpo:1.0,sft:0.2", "simpo:1.0,sft:0.2", "2405.14734"),  # the first one's
    ],
)
def test_card_cites_the_paper_of_the_loss(tmp_path, loss, name, paper):
    record = copy.deepcopy(RECORD)
    record["flags"]["loss"] = loss
    card.from_run(record)(tmp_path)
    _, metadata, text = loaded(tmp_path)
    assert metadata["tags"][-2:] == [name, f"arxiv:{paper}"]
    assert f"`{loss}` loss ([arXiv {paper}](https://arxiv.org/abs/{paper}))" in text


def test_a_run_without_evaluation_or_facts_has_a_card_without_them(tmp_path):
    card.from_run({"flags": {"model": f"{HOME}/base", "loss": "unheard_of"}})(tmp_path)
    found, metadata, text = loaded(tmp_path)
    assert found.data.eval_results is None and "model-index" not in metadata
    assert "## Results" not in text and "None" not in text and "## How to load" in text
    assert metadata["tags"] == ["zeropref", "deepspeed", "preference-optimization", "unheard_of"]


def test_evaluation_fills_its_section_and_only_that(tmp_path):
    figure = tmp_path / "elsewhere" / "log_probs.png"
    figure.parent.mkdir()
    figure.write_bytes(b"png")
    folder = tmp_path / "model"
    folder.mkdir()
    card.from_run(RECORD)(folder)
    path = folder / "README.md"
    path.write_text(path.read_text() + "\nA line by hand.\n")
    assert card.update(folder, report(0.5), [], RECORD) == path
    assert card.update(folder, report(), [figure], RECORD) == path
    found, metadata, text = loaded(folder)
    assert results(found, "held.jsonl") == {
        "reward_accuracy": (0.875, {"n": 40, "interval_95": [0.75, 0.95]}),
        "kl": (2.25, {"n": 40, "interval_95": [2.0, 2.5]}),
        "win_rate": (0.625, {"n": 40, "interval_95": [0.5, 0.75]}),
    }
    # training's own, which are of other data, stand as they were
    assert results(found, "held|out.jsonl")["reward_accuracy"][0] == 0.796875
    for once in ("## Evaluation", "A line by hand.", "## Training"):
        assert text.count(once) == 1, once
    assert [text.count(mark) for mark in card.MARKS] == [1, 1]
    section = text[text.index(card.MARKS[0]) : text.index(card.MARKS[1])]
    assert rows_of(section, "reward accuracy") == [
        "reward accuracy",
        "",
        "0.875",
        "[0.75, 0.95]",
        "40",
    ]
    assert rows_of(section, "log-prob of chosen, nats a token") == [
        "log-prob of chosen, nats a token",
        "-1.625",
        "-1.5",
        "",
        "40",
    ]
    assert rows_of(section, "sampled answers: length, tokens")[1:4] == ["28.25", "31.5", "[29, 34]"]
    assert "Against base-7b: **better**." in section and "* It is.\n" in section
    assert "before is base-7b, after this model" in section
    assert "| loss |" not in section and "reward margin" not in section  # not a number: not shown
    assert "![log probs](figures/log_probs.png)" in section
    assert (folder / "figures/log_probs.png").read_bytes() == b"png"
    assert "Before (sampled, cut at the token limit)\n\n```text\nGood day\n```" in section
    # a fence in the answer stays inside
    assert "After (greedy)\n\n````text\n```\n# Hey\n```\n````" in section
    assert HOME not in text and not (folder / "README.md.tmp").exists()


def test_each_data_set_has_a_section_of_its_own(tmp_path):
    """Other data, of the same name or another, replaces nothing; the same data does."""
    figures = [tmp_path / "margins.png"]
    folder = tmp_path / "model"
    folder.mkdir()
    record = copy.deepcopy(RECORD)
    record["eval_data"] |= {"sources": [f"{HOME}/held.jsonl"], "rows_fingerprint": "1" * 64}
    card.from_run(record)(folder)

    def evaluated(accuracy, source, fingerprint):
        figures[0].write_bytes(f"{accuracy} of {source}".encode())
        found = report(accuracy)
        found["data"] = {"sources": [source], "rows_fingerprint": fingerprint, "which": "--data"}
        card.update(folder, found, figures, record)
        return loaded(folder)

    evaluated(0.25, "other.jsonl", "2" * 64)
    evaluated(0.5, "held.jsonl", "3" * 64)  # the same name as training's, other rows
    evaluated(0.75, "held.jsonl", "1" * 64)  # what training held out
    found, metadata, text = evaluated(0.875, "other.jsonl", "2" * 64)
    by_data = {
        (r.dataset_name, r.dataset_revision): r.metric_value
        for r in found.data.eval_results
        if r.metric_type == "reward_accuracy"
    }
    assert by_data == {
        ("other.jsonl", "2" * 12): 0.875,
        ("held.jsonl", "3" * 12): 0.5,
        ("held.jsonl", "1" * 12): 0.75,
    }
    sections = text[text.index(card.MARKS[0]) : text.index(card.MARKS[1])].split("<!-- data: ")[1:]
    assert [rows_of(each, "reward accuracy")[2] for each in sections] == ["0.875", "0.5", "0.75"]
    titles = re.findall("^## Evaluation on .*$", text, re.M)
    assert titles == [f"## Evaluation on {name}.jsonl" for name in ("other", "held", "held")]
    for each, content in zip(
        sections, ("0.875 of other", "0.5 of held", "0.75 of held"), strict=True
    ):
        (name,) = re.findall(r"!\[margins\]\((.*)\)", each)
        assert (folder / name).read_text() == f"{content}.jsonl"
    json.dumps(metadata, allow_nan=False)


def test_a_section_of_before_data_sets_were_told_apart_stays(tmp_path):
    card.from_run(RECORD)(tmp_path)
    path = tmp_path / "README.md"
    old = f"{card.MARKS[0]}\n## Evaluation\n\nOld words.\n{card.MARKS[1]}"
    path.write_text(path.read_text().replace("\n".join(card.MARKS), old))
    card.update(tmp_path, report(0.25), [], RECORD)
    card.update(tmp_path, report(0.5), [], RECORD)
    found, _, text = loaded(tmp_path)
    assert text.count("Old words.") == 1 and text.count("## Evaluation on held.jsonl") == 1
    assert results(found, "held.jsonl")["reward_accuracy"][0] == 0.5


def test_evaluation_of_models_that_this_project_did_not_train(tmp_path):
    assert card.update(tmp_path, report()) is None and not list(tmp_path.iterdir())
    (tmp_path / "README.md").write_text(
        "---\nlicense: mit\nmodel-index:\n- name: theirs\n  results: []\n---\n# Theirs\n\nTheir words.\n"
    )
    card.update(tmp_path, report())
    found, metadata, text = loaded(tmp_path)
    assert metadata["license"] == "mit" and "Their words." in text
    assert text.count("## Evaluation") == 1
    assert results(found)["reward_accuracy"][0] == 0.875
    card.update(tmp_path, report(0.25))
    found, _, text = loaded(tmp_path)
    assert results(found)["reward_accuracy"][0] == 0.25
    assert text.count("## Evaluation") == 1 and "Their words." in text


def test_model_index_survives_the_round_trip_of_the_hub(tmp_path):
    card.from_run(RECORD)(tmp_path)
    _, metadata, _ = loaded(tmp_path)
    name, parsed = repocard_data.model_index_to_eval_results(metadata["model-index"])
    assert name == "base-7b-dpo" and len(parsed) == 3
    assert repocard_data.eval_results_to_model_index(name, parsed) == metadata["model-index"]
    for index in metadata["model-index"]:  # what the hub's own schema asks of an entry
        for result in index["results"]:
            assert {"type"} <= set(result["task"]) and {"name", "type"} <= set(result["dataset"])
            assert all(isinstance(m["value"], float) and m["type"] for m in result["metrics"])
    json.dumps(metadata, allow_nan=False)


def test_names_of_sources(tmp_path, monkeypatch):
    for source, hub in (
        ("org/name", True),
        ("org/name:sub@train[:10%]", True),
        ("name", False),
        ("a/b/c", False),
        ("./org/name", False),
        ("/org/name", False),
        ("org/file.jsonl", False),
        ("~/x", False),
    ):
        assert card.is_hub(source) == hub, source
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org/name").mkdir(parents=True)
    for path, name in (
        ("/runs/dpo/model", "dpo/model"),
        ("dpo/model/", "dpo/model"),
        ("model", "model"),
        ("/model", "model"),
        ("/x/eval/passages.jsonl", "zeropref's built-in passages.jsonl"),
    ):
        # the second time changes nothing
        assert card.shown(path) == card.shown(card.shown(path)) == name, path
    assert not card.is_hub("org/name")  # a folder of that name goes before the hub
    assert card.shown("org/name") == "name" and card.shown("/a/b/") == "b"


@pytest.mark.filterwarnings("ignore")
def test_how_to_load_runs_as_written(tmp_path, monkeypatch, capsys):
    tiny.save_model(tmp_path)
    card.from_run(RECORD)(tmp_path)
    code = re.search(r"```python\n(.*?)```", (tmp_path / "README.md").read_text(), re.S).group(1)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    exec(code.replace("max_new_tokens=128", "max_new_tokens=8"), {})  # noqa: S102
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("interval", [[float("nan"), 1.0], [None, None]])
def test_an_interval_that_is_no_number_is_left_out(tmp_path, interval):
    found = report()
    found["preferences"]["model"]["rewards/accuracies"] = measure(0.5, interval)
    card.update(tmp_path, found, [], RECORD)
    assert results(loaded(tmp_path)[0], "held.jsonl")["reward_accuracy"] == (0.5, {"n": 40})
    assert rows_of(loaded(tmp_path)[2].partition(card.MARKS[0])[2], "reward accuracy")[1:4] == [
        "",
        "0.5",
        "",
    ]
