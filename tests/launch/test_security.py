"""What a stranger's model or data could do to a machine, and what a run could give away."""

import ast
import dataclasses
import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
import transformers
from safetensors.torch import load_file, save_file

from train import config
from train.data.chat import Chat
from train.models.pretrained import load_causal_lm, load_tokenizer

ROOT = Path(__file__).resolve().parents[2]
PRODUCT = sorted(p for room in ("train", "launch", "eval") for p in (ROOT / room).rglob("*.py"))


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


class Mine:
    """Unpickled, it writes a file."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (open, (str(self.marker), "w"))


# ------------------------------------------------------------ weights


def pickled(model_dir, folder, content=None):
    """The model with its weights in pytorch_model.bin alone."""
    shutil.copytree(model_dir, folder)
    torch.save(content or load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder


def test_pickled_weights_need_a_flag(model_dir, tmp_path):
    folder = pickled(model_dir, tmp_path / "bin")
    with pytest.raises(
        ValueError, match=f"from {folder}: .*a pickle, pytorch_model.bin: .*--allow_pickle"
    ):
        load_causal_lm(folder)
    allowed = load_causal_lm(folder, allow_pickle=True).state_dict()
    expected = load_causal_lm(model_dir).state_dict()
    assert allowed.keys() == expected.keys() and all(
        torch.equal(allowed[name], expected[name]) for name in expected
    )


def test_a_pickle_that_runs_code_does_not_run_even_when_allowed(model_dir, tmp_path):
    marker = tmp_path / "marker"
    folder = pickled(model_dir, tmp_path / "bin", {"model.norm.weight": Mine(marker)})
    for allow in (False, True):
        with pytest.raises(ValueError, match="cannot load a causal language model"):
            load_causal_lm(folder, allow_pickle=allow)
        assert not marker.exists()
    torch.load(folder / "pytorch_model.bin", weights_only=False)["model.norm.weight"].close()
    assert marker.exists()  # or the test shows nothing


@pytest.mark.parametrize("seen", [True, False])
def test_an_adapter_is_not_a_model(model_dir, tmp_path, monkeypatch, seen):
    """With peft, transformers would load the base that it names; in a hub's repository that shows
    afterwards only.
    """
    peft = pytest.importorskip("peft")
    base = transformers.AutoModelForCausalLM.from_pretrained(model_dir)
    peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj"])).save_pretrained(
        tmp_path / "adapter"
    )
    if not seen:
        monkeypatch.setattr("train.models.pretrained.Path.is_file", lambda path: False)
    with pytest.raises(ValueError, match="adapter: it holds an adapter: merge"):
        load_causal_lm(tmp_path / "adapter")


@pytest.mark.parametrize(
    "shard", ["weights.bin", "../outside.safetensors", "{}/outside.safetensors"]
)
def test_an_index_cannot_name_other_files(model_dir, tmp_path, shard):
    """transformers loads whatever the index lists: a pickle among the shards, a file in another
    folder.
    """
    folder = tmp_path / "model"
    shutil.copytree(model_dir, folder)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(tmp_path / "outside.safetensors")
    save_file(
        {"model.norm.weight": weights.pop("model.norm.weight")},
        folder / "first.safetensors",
        {"format": "pt"},
    )
    torch.save(weights, folder / "weights.bin")
    shard = shard.format(tmp_path)
    names = {name: shard for name in weights} | {"model.norm.weight": "first.safetensors"}
    write(
        folder / "model.safetensors.index.json",
        {"metadata": {"total_size": 1}, "weight_map": names},
    )
    with pytest.raises(
        ValueError,
        match="a pickle, weights.bin: " if shard == "weights.bin" else "not a file of its own",
    ):
        load_causal_lm(folder)


def test_a_configuration_cannot_name_a_pickle(model_dir, tmp_path):
    """transformers takes one name that is no safetensors from config.json."""
    folder = tmp_path / "model"
    shutil.copytree(model_dir, folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "adapter_model.bin")
    found = json.loads((folder / "config.json").read_text())
    write(folder / "config.json", found | {"transformers_weights": "adapter_model.bin"})
    with pytest.raises(ValueError, match="a pickle, adapter_model.bin: "):
        load_causal_lm(folder)


# ------------------------------------------------------------ code


CODE = """
import transformers
open({marker!r}, "w").close()

class Config(transformers.LlamaConfig):
    pass

class Model(transformers.LlamaForCausalLM):
    config_class = Config

class Tokenizer(transformers.PreTrainedTokenizerFast):
    pass
"""


@pytest.mark.parametrize("kind", ["llama", "unheard-of"])
def test_code_of_a_model_directory_does_not_run(model_dir, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(
        "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules")
    )
    monkeypatch.syspath_prepend(tmp_path / "modules")
    marker, folder = tmp_path / "marker", tmp_path / "model"
    shutil.copytree(model_dir, folder)
    write(folder / "evil.py", CODE.format(marker=str(marker)))
    found = json.loads((folder / "config.json").read_text())
    auto_map = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    write(folder / "config.json", found | {"model_type": kind, "auto_map": auto_map})
    found = json.loads((folder / "tokenizer_config.json").read_text())
    custom = {} if kind == "llama" else {"tokenizer_class": "Tokenizer"}
    write(
        folder / "tokenizer_config.json",
        found | custom | {"auto_map": {"AutoTokenizer": [None, "evil.Tokenizer"]}},
    )
    read_config = runpy.run_path(str(ROOT / "launch/validate.py"))["model_config"]
    for open_it in (load_causal_lm, load_tokenizer, lambda path: read_config(path, False)):
        try:
            open_it(folder)
        except ValueError as error:
            assert kind != "llama" and "trust_remote_code" in str(error)
        assert not marker.exists()
    load_causal_lm(folder, trust_remote_code=True)
    assert marker.exists()  # or the test shows nothing


@pytest.mark.parametrize(
    "attack",
    [
        "cycler.__init__.__globals__.os.system('touch {}')",
        "().__class__.__mro__[1].__subclasses__()",
        "messages.__class__.__init__.__globals__['sys']",
    ],
)
def test_a_chat_template_runs_in_a_sandbox(model_dir, tmp_path, attack):
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_dir)
    tokenizer.chat_template = tiny.CHATML + "{{ " + attack.format(tmp_path / "marker") + " }}"
    with pytest.raises(
        ValueError, match="cannot render a question and its answer: the chat template refuses it"
    ):
        Chat(tokenizer)
    assert not (tmp_path / "marker").exists()


# What opens pickles or runs text, by the name that is called, and the keyword that makes it
# harmless.
UNSAFE = {
    "torch.load": ("weights_only", True),
    "np.load": ("allow_pickle", False),
    "pickle.load": None,
    "pickle.loads": None,
    "pickle.Unpickler": None,
    "pd.read_pickle": None,
    "joblib.load": None,
    "eval": None,
    "exec": None,
    "os.system": None,
    "yaml.load": None,
    "runpy.run_path": None,
}


@pytest.mark.parametrize("path", PRODUCT, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_line_of_ours_opens_a_pickle(path):
    for call in (
        node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)
    ):
        name = ast.unparse(call.func)
        given = {word.arg: getattr(word.value, "value", None) for word in call.keywords}
        assert not given.get("shell"), f"{path}:{call.lineno}: a shell"
        if name in UNSAFE:
            harmless = UNSAFE[name]
            assert harmless and given.get(harmless[0]) is harmless[1], (
                f"{path}:{call.lineno}: {name}"
            )


# ------------------------------------------------------------ what a run writes, and where


SECRETS = {
    name: f"hf_Sentinel{name.replace('_', '')}0123456789"
    for name in (
        "HF_TOKEN",
        "HUGGING_FACE_HUB_TOKEN",
        "WANDB_API_KEY",
        "OPENAI_API_KEY",
        "AWS_SECRET_ACCESS_KEY",
        "GITHUB_TOKEN",
        "COMET_API_KEY",
        "MLFLOW_TRACKING_TOKEN",
    )
}
TYPED = "hf_TypedOnTheCommandLine0123456789"  # a secret that a user puts into a flag


def files_under(folder):
    return {
        path: path.stat().st_mtime_ns
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and ".git" not in path.parts
    }


def test_no_secret_is_written_and_nothing_outside_the_output(model_dir, tmp_path):
    """One run to its end, and runs that are refused; text that looks like paths, names that look
    like commands.
    """
    names = [
        "../../escape",
        "/escape",
        "a/../../escape",
        "~/escape",
        "escape\0",
        "$(touch escape)",
        "C:\\escape",
    ]
    rows = [
        {"prompt": f"{name} {i}", "chosen": name, "rejected": f"not {name}", "split": name}
        for i in range(2)
        for name in names
    ]
    data = write(tmp_path / "data/$(touch escape);.jsonl", "\n".join(map(json.dumps, rows)))
    write(tmp_path / "hf/token", SECRETS["HF_TOKEN"])
    broken = write(tmp_path / "data/broken.jsonl", "{")
    common = [
        "--max_length",
        "512",
        "--model",
        str(model_dir),
        "--max_steps",
        "1",
        "--batch_size",
        "2",
        "--output",
    ]
    out, address = str(tmp_path / "out/../out/run"), f"https://user:{TYPED}@example.org/pairs.jsonl"
    lines = [
        [*common, out, "--data", str(data), "--eval_split", "0.3"],
        [*common, str(tmp_path / "out/b"), "--data", str(broken)],
        [*common, str(tmp_path / "out/c"), "--data", "org/does-not-exist"],
        [*common, str(tmp_path / "out/d"), "--data", address],
        [
            *common,
            str(tmp_path / "out/e"),
            "--data",
            f"https://example.org/pairs.jsonl?signature={TYPED}",
        ],
        [*common, str(tmp_path / "out/f"), "--model", address],
        [*common, str(tmp_path / "out/g"), "--loss_args", f"{{a: {TYPED}}}"],
    ]
    before = files_under(tmp_path) | files_under(ROOT)
    environment = {
        **os.environ,
        **SECRETS,
        "OMP_NUM_THREADS": "1",
        "ZEROPREF_CACHE": str(tmp_path / "cache"),
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "hf"),
    }
    command = [
        sys.executable,
        "tests/launch/many.py",
        str(ROOT / "launch/train_dpo.py"),
        json.dumps(lines),
    ]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400
    )
    codes = [part.partition("\n")[0] for part in done.stdout.split("=== ")[1:]]
    assert codes == ["0", "4", "4", "2", "2", "2", "2"], done.stderr[-3000:]
    assert (
        done.stderr.count("seems to hold a password or a token") == 4
        and "Traceback" not in done.stderr
    )
    after = files_under(tmp_path) | files_under(ROOT)
    new = [path for path in after if before.get(path) != after[path]]
    inside = [tmp_path / name for name in ("out", "cache", "hf")]
    assert [path for path in new if not any(folder in path.parents for folder in inside)] == []
    assert not [path for path in new if "escape" in path.name]
    written = {path: path.read_bytes() for path in new}
    assert any(
        str(data).encode() in content for content in written.values()
    )  # such a search finds what is there
    for secret in (*SECRETS.values(), TYPED):
        assert [str(path) for path, content in written.items() if secret.encode() in content] == []
        assert secret not in done.stdout + done.stderr
    assert not [folder for folder in "defg" if (tmp_path / "out" / folder).exists()]


@dataclasses.dataclass
class Settings:
    """Flags that name things."""

    model: str | None = None
    """A directory."""
    data: list[str] | None = None
    """Files."""
    output: str = "out"
    """A folder."""
    loss_args: dict = dataclasses.field(default_factory=dict)
    """Parameters."""


@pytest.mark.parametrize(
    "value",
    [
        "https://user:word@host/x",
        "https://host/x?X-Amz-Signature=word",
        "s3://key@bucket/x",
        "hf_abcdefghijklmnopqrstuv",
        "org/name:hf_abcdefghijklmnopqrstuv",
    ],
)
def test_flags_with_secrets_are_not_repeated(capsys, value):
    for flag in ("model", "data", "output", "loss_args.a"):
        with pytest.raises(SystemExit) as stop:
            config.parse(Settings, [f"--{flag}", value])
        said = capsys.readouterr().err
        assert stop.value.code == 2 and f"--{flag.removesuffix('.a')} seems to hold" in said
        assert value not in said and "word" not in said.replace("password", "")


def test_flags_that_no_log_can_hold_are_refused(capsys):
    with pytest.raises(SystemExit):
        config.parse(Settings, ["--output", "caf\udce9"])
    assert "--output is not UTF-8: 'caf\\udce9'" in capsys.readouterr().err
    for harmless in ("org/name:config@train[:10%]", "hf_short", "what?", "a@b"):
        assert config.parse(Settings, ["--data", harmless]).data == [harmless]
