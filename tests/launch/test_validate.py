"""launch/validate.py as users call it: the report's numbers by hand, and the same answers as
training gives.
"""

import dataclasses
import gzip
import json
import runpy
import shutil

import numpy as np
import pytest
import tiny
import transformers

from tests.launch.commands import ROOT, several
from train.data.tokens import prepare

PAIRS = ROOT / "train/data/builtin/train.jsonl"
ROW = {"prompt": "Hi", "chosen": "Hey there!", "rejected": "Greetings."}


def write(path, *rows):
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    )
    return path


def without_weights(start, folder, **tokenizer):
    """The model directory without its weights: what a validation needs. `tokenizer`: attributes to
    set.
    """
    shutil.copytree(start, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    if tokenizer:
        changed = transformers.AutoTokenizer.from_pretrained(start)
        for name, value in tokenizer.items():
            setattr(changed, name, value)
        (folder / "chat_template.jinja").unlink(missing_ok=True)
        changed.save_pretrained(folder)
    return folder


def larger(start, folder):
    """A tokenizer with one token more than the model has, "<far>"."""
    without_weights(start, folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    content["added_tokens"].append(
        {**content["added_tokens"][0], "content": "<far>", "id": tiny.VOCAB, "special": False}
    )
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


ROW_TURN = {"role": "assistant", "content": "Hey."}
MIXED = [
    ROW,
    {**ROW, "chosen": "Hello!"},
    {**ROW, "prompt": " "},
    ROW,  # a duplicate
    '{"prompt": "Hi", "prompt": "Ho", "chosen": "a", "rejected": "b"}',
    {"prompt": "Another", "chosen": "kind of " * 400, "rejected": "answer"},  # cut
    {**ROW, "prompt": "Say <|im_end|>"},
]


def refused(model_dir, tmp_path):
    """Arguments, exit code, what the line says: model and flags (2), data (4)."""
    good = write(tmp_path / "good.jsonl", ROW)
    return [
        (["--max_legth", 100], 2, "did you mean --max_length"),
        (["--max_dropped", 2], 2, "--max_dropped is a share"),
        (
            ["--model", without_weights(model_dir, tmp_path / "bare", chat_template=None)],
            2,
            "no chat template",
        ),
        (
            ["--model", without_weights(model_dir, tmp_path / "endless", eos_token=None)],
            2,
            "no eos_token",
        ),
        (
            [
                "--model",
                larger(model_dir, tmp_path / "larger"),
                "--data",
                write(tmp_path / "far.jsonl", {**ROW, "chosen": "How <far> is it?"}),
            ],
            2,
            "the data has token 1,024, '<far>', and the model's vocabulary is 1,024",
        ),
        (
            ["--chat_template", tmp_path / "none.jinja"],
            2,
            "none.jinja: cannot be read: No such file",
        ),
        (["--data", good, "--columns", "promt=q"], 2, "--columns promt=q: expected WANTED=FOUND"),
        (["--json"], 2, "--json changes nothing without --show"),
        (["--model", tmp_path / "nowhere"], 2, "there is no folder"),
        (["--max_length", 513], 2, "--max_length 513 is more than the model's 512 positions"),
        (["--max_prompt_length", 600], 2, "leaves no room"),
        (["--data", tmp_path / "god.jsonl"], 4, "no such file or folder (did you mean good.jsonl"),
        (
            ["--data", write(tmp_path / "broken.jsonl", ROW, "{")],
            4,
            "broken.jsonl, line 2, column 2: not JSON",
        ),
        (
            [
                "--data",
                write(tmp_path / "columns.jsonl", {"question": "a", "chosen": "b", "rejecte": "c"}),
            ],
            4,
            "no column 'rejected'; found 'question', 'chosen', 'rejecte'; expected 'prompt', 'chosen', 'rejected'; "
            "if these are the columns meant, pass --columns prompt=question rejected=rejecte",
        ),
        (
            ["--data", write(tmp_path / "mixed.jsonl", *MIXED)],
            4,
            "3 of 7 rows (42.9%) cannot be used",
        ),
        (
            ["--data", write(tmp_path / "all.jsonl", {**ROW, "prompt": ""}), "--max_dropped", 1],
            4,
            "1 of 1 rows",
        ),
        (
            ["--data", write(tmp_path / "odd.jsonl", {**ROW, "chosen": json.dumps([ROW_TURN])})],
            4,
            "implausible data: 1 of 1 rows: a text is a conversation written out as JSON or Python",
        ),
        (["--data", good, "--eval_split", 0.5], 4, "of 1 distinct prompts leaves"),
        (["--data", good, "--eval_data", tmp_path / "none.jsonl"], 4, "none.jsonl: no such file"),
        (["--data", "csv"], 4, "csv: no such file or folder"),
        (
            ["--data", "https://example.org/pairs.jsonl"],
            4,
            "https://example.org/...: addresses are not read",
        ),
    ]


def the_line(err):
    said = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and "Traceback" not in err, err[-2000:]
    return said[0]


def test_reports_and_refusals(model_dir, tmp_path):
    bad = refused(model_dir, tmp_path)
    fixed = ["--max_length", 512, "--model", without_weights(model_dir, tmp_path / "light")]
    mixed = [
        *fixed,
        "--data",
        tmp_path / "mixed.jsonl",
        "--eval_data",
        tmp_path / "good.jsonl",
        "--max_dropped",
        0.5,
    ]
    mixed += ["--output", tmp_path / "report.json"]
    split = [*fixed, "--data", PAIRS, "--eval_split", 0.2]
    (code, out, err), ours, *others = several(
        "launch/validate.py",
        [mixed, split, *([*fixed, *extra] for extra, *_ in bad)],
        tmp_path / "cache",
    )
    assert code == "0", err[-3000:]
    assert (tmp_path / "report.json").read_text() == out
    _check_mixed(json.loads(out), model_dir, tmp_path)
    report = json.loads(ours[1])
    assert ours[0] == "0" and report["verdict"] == "usable" and report["data"]["rows"] == 192
    assert (
        sum(report["split"].values()) == 192
        and report["prompts_in_both"] == 0 < report["split"]["held_out"]
    )
    for (extra, code, words), (found, out, err) in zip(bad, others, strict=True):
        assert found == str(code), (extra, found, err[-2000:])
        assert words in the_line(err), (extra, err)
        if (
            extra[0] not in ("--max_legth", "--json") and "share" not in words
        ):  # flags that are none leave nothing to report on
            report = json.loads(out)
            assert report["verdict"] == "refused" and f"error: {report['reason']}" == the_line(err)
            if "3 of 7" in words:  # refused, but told whole
                assert [row["row"] for row in report["data"]["dropped_rows"]] == [2, 4, 6]


def _check_mixed(report, model_dir, tmp_path):
    data = report["data"]
    assert (
        report["verdict"] == "usable"
        and report["reason"] is None
        and report["flags"]["max_dropped"] == 0.5
    )
    assert (data["rows"], data["usable"], data["dropped"], data["duplicates"]) == (7, 4, 3, 1)
    assert {row["row"]: row["reason"] for row in data["dropped_rows"]} == {
        2: "empty prompt",
        4: "the row has the key 'prompt' twice",
        6: "control token '<|im_end|>' in the text (--allow_control_tokens keeps it)",
    }
    assert set(data["dropped_reasons"].values()) == {1}
    assert data["truncated"] == {"pairs": 1, "prompt": 0, "chosen": 1, "rejected": 0}
    assert data["prompts"] == {"distinct": 2, "repeats": 2} and report["prompts_in_both"] == 1
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_dir)

    def prompt_tokens(text):
        system = "<|im_start|>system\nYou are helpful.<|im_end|>\n"
        turn = f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
        return len(tokenizer(system + turn, add_special_tokens=False)["input_ids"])

    prompts = sorted([prompt_tokens("Hi")] * 3 + [prompt_tokens("Another")])
    tokens = data["tokens"]["prompt"]
    assert tokens["0"] == prompts[0] and tokens["0.75"] == prompts[2] and tokens["1"] == prompts[3]
    assert tokens["mean"] == round(float(np.mean(prompts)), 1)
    assert data["tokens"]["chosen"]["1"] == 512 - prompt_tokens("Another")
    trained = prepare(
        [tmp_path / "mixed.jsonl"],
        tokenizer,
        max_length=512,
        max_prompt_length=256,
        max_dropped=0.5,
        cache_dir=tmp_path / "cache2",
    )
    assert (
        data["fingerprint"] == trained.fingerprint
        and data["tokens"]["all"] == trained.lengths.sum()
    )


@pytest.mark.slow
def test_training_says_the_same(model_dir, tmp_path):
    """Each refusal in the very words of train_dpo.py, which is given the same directory with its
    weights.
    """
    bad = refused(model_dir, tmp_path)
    for folder in ("bare", "endless", "larger"):
        shutil.copy(model_dir / "model.safetensors", tmp_path / folder)
    bad = [extra for extra, *_ in bad if "--json" not in extra]  # validate's own
    fixed = ["--max_length", 512, "--model", model_dir]
    ours = several("launch/validate.py", [[*fixed, *extra] for extra in bad], tmp_path / "cache")
    lines = [[*fixed, *extra, "--output", tmp_path / f"out{i}"] for i, extra in enumerate(bad)]
    theirs = several("launch/train_dpo.py", lines, tmp_path / "cache")
    for extra, (code, _, err), (expected, _, said) in zip(bad, ours, theirs, strict=True):
        assert (code, the_line(err)) == (expected, the_line(said)), extra


def test_settings_are_training_s():
    """Flags of the same name mean and default to the same."""
    settings = [
        runpy.run_path(str(ROOT / script))["Settings"]
        for script in ("launch/validate.py", "launch/train_dpo.py", "launch/train_reward.py")
    ]
    ours, dpo, reward = (
        {f.name: (f.type, f.default) for f in dataclasses.fields(each)} for each in settings
    )
    own = {"output", "show", "json", "trainer"}
    assert {name for name in ours if ours[name] != reward.get(name)} == own
    assert {name for name in ours if ours[name] != dpo.get(name)} == own | {"margin"}


def test_data_for_a_reward_model(model_dir, tmp_path):
    """Margins, from a column and from scores; single answers with scores; a bad margin by name. The
    texts are those of launch/train_reward.py, the template's tail included.
    """
    scored = [
        {**ROW, "prompt": f"Say {i}", "score_chosen": 5 + i, "score_rejected": 4, "margin": i}
        for i in range(4)
    ]
    pairs = write(tmp_path / "pairs.jsonl", *scored)
    single = write(
        tmp_path / "single.jsonl",
        {"prompt": "Hi", "completion": "Hey", "score": 0.25},
        {"prompt": "Ho", "completion": "Hey", "score": -3},
    )
    bad = write(tmp_path / "bad.jsonl", *scored[:2], {**ROW, "margin": "much"})
    nan = write(tmp_path / "nan.jsonl", {**ROW, "margin": float("nan")})
    fixed = ["--model", model_dir, "--max_length", 512, "--trainer", "reward"]
    column, scores, answers, *refusals, plain = several(
        "launch/validate.py",
        [
            [*fixed, "--data", pairs],
            [*fixed, "--data", pairs, "--margin", "scores"],
            [*fixed, "--data", single],
            [*fixed, "--data", bad],
            [*fixed, "--data", nan],
            [*fixed, "--data", write(tmp_path / "none.jsonl", ROW), "--margin", "scores"],
            [*fixed[:-2], "--data", pairs],
        ],
        tmp_path / "cache",
    )
    for (code, out, err), least, most, mean in (
        (column, 0, 3, 1.5),
        (scores, 1, 4, 2.5),
        (answers, -3, 0.25, -1.375),
    ):
        assert code == "0", err[-2000:]
        found = json.loads(out)["data"]["targets"]
        assert (found["0"], found["1"], found["mean"]) == (least, most, mean)
    assert set(json.loads(answers[1])["data"]["truncated"]) == {"pairs", "prompt", "completion"}
    lines = [the_line(err) for _, _, err in refusals]
    assert [code for code, _, _ in refusals] == ["4"] * 3
    assert "1 of 3 rows" in lines[0] and "margin is 'much', not a finite number" in lines[0]
    assert "margin is nan, not a finite number" in lines[1]
    assert "no column 'score_chosen'" in lines[2]
    tokens = [json.loads(out)["data"]["tokens"]["chosen"]["1"] for _, out, _ in (column, plain)]
    assert tokens[0] == tokens[1] + 1  # the newline behind <|im_end|>
    assert "targets" not in json.loads(plain[1])["data"]


def test_what_is_no_longer_refused(model_dir, tmp_path):
    """No pad token; a token that no text reaches; --max_length below the default of the prompt's; a
    template of the user's own; columns of other names, compressed.
    """
    good = write(tmp_path / "good.jsonl", ROW)
    template = tmp_path / "own.jinja"
    template.write_text("{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}")
    renamed = tmp_path / "renamed.jsonl.gz"
    other = {"question": "Hi", "better": "Hey there!", "worse": "Greetings."}
    renamed.write_bytes(gzip.compress(json.dumps(other).encode()))
    bare = without_weights(model_dir, tmp_path / "bare", chat_template=None)
    light = ["--max_length", 512, "--model", without_weights(model_dir, tmp_path / "light")]
    lines = [
        ["--model", without_weights(model_dir, tmp_path / "padless", pad_token=None)],
        ["--model", larger(model_dir, tmp_path / "larger")],
        [*light, "--max_length", 200],
        ["--model", bare, "--chat_template", template],
        [
            *light,
            "--data",
            renamed,
            "--columns",
            "prompt=question",
            "chosen=better",
            "rejected=worse",
        ],
    ]
    lines = [["--max_length", 512, "--data", good, *line] for line in lines]
    results = several("launch/validate.py", lines, tmp_path / "cache")
    for line, (code, out, err) in zip(lines, results, strict=True):
        assert code == "0", (line, err[-2000:])
        assert json.loads(out)["data"]["usable"] == 1
    assert json.loads(results[2][1])["flags"]["max_prompt_length"] == 100


def test_show(model_dir, tmp_path):
    """The first two rows, and those that are cut or dropped, in the data's order; ids as transformers
    makes them.
    """
    light = without_weights(model_dir, tmp_path / "light")
    rows = [ROW, {**ROW, "chosen": "Hello!"}, {**ROW, "prompt": "Bye"}, *MIXED[2:]]
    data = write(tmp_path / "rows.jsonl", *rows)
    fixed = ["--max_length", 512, "--max_dropped", 0.5, "--model", light, "--data", data]
    report = tmp_path / "report.json"
    shown, text = several(
        "launch/validate.py",
        [[*fixed, "--show", 2, "--json", "--output", report], [*fixed, "--show", 1]],
        tmp_path / "cache",
    )
    assert shown[0] == text[0] == "0", shown[2] + text[2]
    records = [json.loads(line) for line in shown[1].splitlines()]
    assert [record["row"] for record in records] == [0, 1, 3, 5, 6, 7]
    assert json.loads(report.read_text())["verdict"] == "usable"
    assert "cut to the length limits: the prompt of 0 (0.0%) and an answer of 1" in shown[2]
    dropped = {record["row"]: record["dropped"] for record in records if record["dropped"]}
    assert dropped == {
        3: "empty prompt",
        5: "the row has the key 'prompt' twice",
        7: "control token '<|im_end|>' in the text (--allow_control_tokens keeps it)",
    }
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_dir)
    first, _, _, _, cut, _ = records
    turns = [{"role": "user", "content": "Hi"}]
    prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    assert first["prompt_ids"] == prompt and first["source"] == str(data)
    for name in ("chosen", "rejected"):
        turn = {"role": "assistant", "content": ROW[name]}
        whole = tokenizer.apply_chat_template([*turns, turn], return_dict=False)
        ids = first[f"{name}_ids"]
        assert [*prompt, *ids] == whole[: len(prompt) + len(ids)] and ids[-1] == 2
        assert first["scored"][name] == [True] * len(ids) and first["end"][name] == len(ids) - 1
        assert first[name] == f"{ROW[name]}<|im_end|>"
        assert first["tokens"][name] == tokenizer.convert_ids_to_tokens(ids)
    assert cut["cut"] == {"prompt": False, "chosen": True, "rejected": False}
    assert cut["end"] == {"chosen": None, "rejected": len(cut["rejected_ids"]) - 1}
    assert len(cut["prompt_ids"]) + len(cut["chosen_ids"]) == 512
    # The same for people; no colour where no terminal reads it.
    assert f"{data} row 0\n  prompt, {len(prompt)} tokens\n" in text[1] and "\033" not in text[1]
    assert " ║ " in text[1] and "dropped: empty prompt" in text[1] and "cut: chosen" in text[1]
    assert f"scored  all of {len(first['chosen_ids'])}; end token: the last, 2" in text[1]
    assert text[1].count("rows.jsonl row ") == 5
