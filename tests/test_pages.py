"""Every command on the pages README.md, train/, eval/ and launch/README.md is run, or at the least read
by the parsers that would read it.

They are run as they stand, in the order of SCRIPTS, in a folder that has what they name: MODEL, DIR,
BASE and the hub's names are tiny models there, pairs.jsonl and the like are rows of the built-in data,
and runs/dpo/model is what an earlier command wrote. Flags are added that make a run short.
"""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import datasets
import pytest
import tiny

from tests.launch import test_slurm
from tests.launch.commands import free_port, settings_of
from train import config
from train.models import builtin

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "train/README.md", "eval/README.md", "launch/README.md")
DPO, REWARD, PPO, EVALUATE, VALIDATE, EXPORT = SCRIPTS = (
    "launch/train_dpo.py",
    "launch/train_reward.py",
    "launch/train_ppo.py",
    "eval/evaluate.py",
    "launch/validate.py",
    "launch/export.py",
)
# What a command of this project begins with; on an indented line anything else has to be in TEXTS.
PROGRAMS = re.compile(
    r"(deepspeed|python|torchrun|srun|sbatch|scancel|pip|pytest|tensorboard|transformers|vllm|"
    r"zeropref-\w+|launch/slurm/\w+\.\w+) \S|pytest( |$)"
)
# How the indented blocks begin that are no commands.
TEXTS = (
    "64 held-out pairs ",
    "launch/                 entry points",
    '{"prompt": "Hi!", ',
    "pairs.jsonl row 0",
    "pairs.jsonl row 1",
    "model = AutoModelForSequenceClassification",
)


class Run(NamedTuple):
    """With `added` flags, and words put for others, in one process with all of its script's."""

    added: str = "--max_steps 1"
    words: dict = {}


class Launch(NamedTuple):
    """With `added`, as a command of its own: launchers, and what is no script of the table's."""

    added: str = ""
    said: str = ""  # part of what it prints
    words: dict = {}


class Read(NamedTuple):
    """By the launcher's parser and the script's; it is not run because of `why`."""

    why: str


class Submitted(NamedTuple):
    """To a SLURM cluster of this test's own, and held there: its jobs are run in test_slurm.py."""


class Elsewhere(NamedTuple):
    """Run by that test, in which `word` stands; or by nothing, because of `why`."""

    test: str = ""
    word: str = ""
    why: str = ""


# 8 GPUs are two ranks, and a model of 7B parameters a tiny one
GPUS = {"8": "2", "--num_gpus": "--num_accelerators"}
SMALL = "--model MODEL --data pairs.jsonl --eval_data pairs.jsonl --max_steps 1 --batch_size 4 --max_length 256 --max_prompt_length 128"
NODES = Read("needs two machines; tests/launch/test_multinode.py runs it on one")
DRY = "--dry-run --no-deps --no-index --no-build-isolation --quiet"
COUNTED = "--max_steps 1 --batch_size 4 --max_new_tokens 8"
FILE = {"PAIRS": "pairs.jsonl"}
FEW = "--prompts 2 --max_new_tokens 4"
BENCH = "--model MODEL --rounds 1"
ONE_STEP = "--pairs 2 --contenders ours --precision fp32"
# In order of the pages, each command once.
COMMANDS = {
    # README.md
    "pip install -c constraints.txt -e .": Launch(DRY),
    "deepspeed launch/train_dpo.py": Launch("--max_steps 1 --save_every 1", "reward margin"),
    "deepspeed launch/train_reward.py": Run(),
    "deepspeed launch/train_ppo.py": Run(f"{COUNTED} --output runs/demonstration"),
    "deepspeed eval/evaluate.py": Run(f"{FEW} --output runs/eval"),
    "python launch/validate.py": Run(""),
    "python launch/export.py": Run("runs/dpo/checkpoints/step-1 exported"),
    "deepspeed launch/train_ppo.py --model runs/dpo/model": Run(COUNTED),
    "deepspeed eval/evaluate.py --model runs/ppo/model --reference runs/dpo/model --output runs/ppo/eval": Run(FEW),
    "deepspeed launch/train_dpo.py --loss ipo --output runs/ipo": Run(),
    "deepspeed eval/evaluate.py --model runs/ipo/model --reference runs/dpo/model --output runs/ipo/eval": Run(FEW),
    "pip install -c constraints.txt -e '.[test]'": Launch(DRY),
    "python -m train.engine.advice": Launch(),
    "python tests/benchmarks/gpu.py": Elsewhere(why="needs a GPU"),
    "pytest": Elsewhere(".ci/run", "pytest || status=1"),
    "pip wheel --no-deps .": Elsewhere("tests/test_wheel.py", '"pip", "wheel"'),
    "deepspeed $(which zeropref-dpo)": Elsewhere("tests/test_wheel.py", '"zeropref-dpo"'),
    "deepspeed launch/train_dpo.py --model HuggingFaceTB/SmolLM2-360M-Instruct --data my_pairs.jsonl --eval_split 0.05 --output runs/mine": Run(),
    "deepspeed launch/train_dpo.py --config launch/recipes/smollm_human_like.yaml": Run(),
    "deepspeed --num_gpus 8 launch/train_dpo.py --config launch/recipes/qwen2_5_7b_zero2.yaml": Launch(SMALL, "reward margin", GPUS),
    "torchrun --nproc_per_node 8 launch/train_dpo.py ...": Launch(f"{SMALL} --output runs/torchrun", "reward margin", GPUS),
    "srun python launch/train_dpo.py ...": Submitted(),
    "python launch/train_dpo.py ...": Run("--max_steps 1 --output runs/plain"),
    "deepspeed --master_port 29501 ...": Elsewhere("tests/launch/test_slips.py", '"--master_port"'),
    "deepspeed --log_level error ...": Launch("launch/train_dpo.py --print_config", "model:"),
    "python launch/validate.py --model MODEL --data pairs.jsonl --show 1": Run(""),
    "deepspeed eval/evaluate.py --model runs/dpo/model --reference BASE --output runs/dpo/eval": Run(FEW),
    "transformers serve runs/dpo/model": Elsewhere(why="needs transformers[serving]"),
    "transformers chat runs/dpo/model": Elsewhere(why="talks to the server"),
    "vllm serve runs/dpo/model": Elsewhere(why="needs vLLM and a GPU"),
    "tensorboard --logdir runs": Launch("--inspect", "train/rewards/margins"),
    "tensorboard --logdir runs/dpo": Launch("--inspect", "train/rewards/margins"),
    "python launch/export.py runs/dpo/checkpoints/step-400 my-model": Run("", {"step-400": "step-1"}),
    "python tests/benchmarks/dpo_step.py --data PAIRS --pairs 4": Launch(f"{BENCH} {ONE_STEP}", "ours", FILE),
    "pip install -e '.[peers]'": Launch(DRY),
    "pip install -e '.[trackers]'": Launch(DRY),
    "python tests/benchmarks/evaluate_rows.py --data PAIRS --pairs 16 --batch 1 8": Launch(f"{BENCH} --pairs 2", "packed", FILE),
    "pytest -m slow": Elsewhere(".ci/run", "pytest -m slow"),
    "pytest -m matrix": Elsewhere("setup.cfg", "    matrix: "),
    "pytest -m gpu": Elsewhere("setup.cfg", "    gpu: "),
    # train/README.md
    "pip install -e '.[lora]'": Launch(DRY),
    "python tests/benchmarks/peers_losses.py": Elsewhere("tests/losses/test_peers.py", "peers_losses"),
    "deepspeed launch/train_reward.py --model DIR --data pairs.jsonl --eval_split 0.05 --output runs/judge": Run(),
    "deepspeed launch/train_reward.py --config launch/recipes/smollm_human_like_reward.yaml": Run(),
    "deepspeed --num_gpus 8 launch/train_reward.py --config launch/recipes/qwen2_5_7b_reward_zero3.yaml": Launch(SMALL, "accuracy", GPUS),
    "launch/validate.py --trainer reward": Run("--model MODEL --data pairs.jsonl"),
    "deepspeed eval/evaluate.py --reward_model runs/judge/model --data pairs.jsonl": Run("--output runs/judge/eval"),
    "deepspeed eval/evaluate.py --model runs/dpo/model --reference BASE --reward_model runs/judge/model": Run(f"{FEW} --output runs/judged"),
    "python tests/benchmarks/reward_step.py --data PAIRS": Launch(f"{BENCH} {ONE_STEP}", "ours", FILE),
    "deepspeed launch/train_ppo.py --algorithm ppo --model runs/dpo/model --data prompts.jsonl --reward_model runs/reward/model": Run(f"{COUNTED} --output runs/with_value"),
    "deepspeed launch/train_ppo.py --algorithm grpo --model DIR --data problems.jsonl --columns prompt=question --reward number:answer": Run(f"{COUNTED} --output runs/problems"),
    "python launch/train_ppo.py --algorithm dapo --print_config": Run(""),
    # eval/README.md
    "deepspeed eval/evaluate.py --model runs/dpo/model --reference ~/.cache/zeropref/models/SmolLM2-135M-Instruct --output runs/dpo/eval": Run(f"{FEW} --output runs/dpo/again"),
    "deepspeed eval/evaluate.py --reward_model runs/reward/model --output runs/reward/eval": Run(""),
    "deepspeed eval/evaluate.py --reward_model DIR --data rewardbench.parquet --by subset --max_length 2048 --max_prompt_length 1536": Run("--output runs/bench", {"DIR": "runs/judge/model"}),
    # launch/README.md
    "sbatch --gpus-per-node=8 --cpus-per-task=64 --time=8:00:00 launch/slurm/train.sbatch launch/train_dpo.py --config recipe.yaml": Submitted(),
    "launch/slurm/pipeline.sh --gpus-per-node=8 launch/train_dpo.py --output runs/a ... then --gpus-per-node=1 eval/evaluate.py --model runs/a/model --output runs/a/eval": Submitted(),
    "launch/slurm/pipeline.sh --gpus-per-node=8 launch/train_reward.py --output runs/r ... then --gpus-per-node=1 eval/evaluate.py --reward_model runs/r/model --output runs/r/eval": Submitted(),
    "launch/slurm/pipeline.sh --gpus-per-node=1 launch/train_reward.py --config launch/recipes/smollm_human_like_reward.yaml then --gpus-per-node=1 launch/train_ppo.py --config launch/recipes/smollm_human_like_ppo.yaml then --gpus-per-node=1 eval/evaluate.py --model runs/smollm_human_like_ppo/model --reward_model runs/smollm_human_like_reward/model --output runs/smollm_human_like_ppo/eval": Submitted(),
    "launch/slurm/sweep.sbatch --gpus-per-node=1 values.yaml launch/train_dpo.py ...": Submitted(),
    "scancel --signal=USR1 JOB": Elsewhere("tests/launch/test_slurm.py", '"scancel", "--signal='),
    "deepspeed --hostfile hostfile --no_ssh --node_rank 0 --master_addr node1 launch/train_dpo.py ...": NODES,
    "torchrun --nnodes 2 --nproc_per_node 8 --node_rank 0 --master_addr node1 launch/train_dpo.py ...": NODES,
    "deepspeed --hostfile hostfile launch/train_dpo.py ...": NODES,
    "python launch/validate.py --model MODEL --data pairs.jsonl": Run(""),
}  # fmt: skip


def commands(page: str) -> list[str]:
    """Every command of a page: of indented lines, and between backticks where it has an argument."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = []
    for block in re.findall(r"(?:^    .*\n)+", text, re.M):
        block = re.sub(r"\\\n\s*", "", block)
        lines = [line.strip() for line in block.splitlines()]
        if block.startswith("        ") or lines[0].startswith(TEXTS):
            continue
        for line in lines:
            assert PROGRAMS.match(line), f"{page}: {line!r} is no known command, and not in TEXTS"
            line = re.split(r"\s+#\s", line)[0]
            found += re.split(r" && | & ", line)
    inline = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text)]
    found += [span for span in inline if PROGRAMS.match(span) or span in COMMANDS]
    return [" ".join(command.split()) for command in found]


def script_of(words: list[str]) -> tuple[str, list[str]]:
    """The script that a command starts, and its flags."""
    at = next(i for i, word in enumerate(words) if word in SCRIPTS)
    return words[at], [word for word in words[at + 1 :] if word != "..."]


def rows(kind):
    return [(command, row) for command, row in COMMANDS.items() if isinstance(row, kind)]


def test_the_table_holds_what_the_pages_say_and_no_more():
    said = {command for page in PAGES for command in commands(page)}
    assert said == set(COMMANDS)
    for command, row in rows(Elsewhere):
        assert bool(row.why) != bool(row.test), command
        if row.test:
            assert row.word in (ROOT / row.test).read_text(encoding="utf-8"), command


def test_flags_and_launchers_are_read(monkeypatch):
    """What does not run here is read by DeepSpeed's and torch's own parsers; a script's flags of
    every command, those of SLURM's stages too, by the script's.
    """
    from deepspeed.launcher import runner
    from torch.distributed import run as torchrun

    monkeypatch.chdir(ROOT)
    for command, _ in rows(Read):
        program, *words = shlex.split(command)
        if program == "deepspeed":
            read = runner.parse_args(words)
            script = read.user_script
        else:
            script = torchrun.parse_args(words).training_script
        assert script == script_of(words)[0], command
    for command, row in rows((Read, Submitted, Run)):
        for stage in command.split(" then "):
            script, flags = script_of(shlex.split(stage))
            if isinstance(row, Run):
                flags += shlex.split(row.added)
            # the reader's own recipe; what prints and ends; what has a parser of its own
            if script != EXPORT and not {"recipe.yaml", "--print_config"} & set(flags):
                config.parse(settings_of(script), flags)


def test_pictures_and_links_are_there():
    """What a page links to in the repository exists; a picture is under 200 kB, and on some page."""
    linked = set()
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
            if "://" not in target:
                path = (ROOT / page).parent / target
                assert path.is_file(), f"{page}: {target}"
                linked.add(path.resolve())
    pictures = set((ROOT / ".github/pictures").iterdir())
    assert pictures <= linked
    assert all(path.stat().st_size < 200_000 for path in pictures)


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A folder with what the pages' commands name."""
    folder = tmp_path_factory.mktemp("pages")
    for name in ("train", "launch", "eval", "ds_configs", "tests"):
        (folder / name).symlink_to(ROOT / name)
    home = folder / ".cache/zeropref/models" / builtin.NAME
    tiny.save_model(home, max_position_embeddings=4096)
    builtin.write_manifest(home, "made by a test")
    hub = folder / "HuggingFaceTB"
    hub.mkdir()
    for name in (
        "MODEL",
        "DIR",
        "BASE",
        hub / "SmolLM2-360M-Instruct",
        hub / "SmolLM-135M-Instruct",
    ):
        (folder / name).symlink_to(home)
    text = (ROOT / "train/data/builtin/train.jsonl").read_text(encoding="utf-8")
    pairs = [json.loads(line) for line in text.splitlines()[:60]]

    def write(name, made):
        (folder / name).write_text(
            "".join(json.dumps(row) + "\n" for row in made), encoding="utf-8"
        )

    for name in ("pairs.jsonl", "my_pairs.jsonl"):
        write(name, pairs)
    write("prompts.jsonl", [{"prompt": row["prompt"]} for row in pairs[:12]])
    write("problems.jsonl", [{"question": f"{n} + {n}?", "answer": f"{n + n}"} for n in range(12)])
    bench = datasets.Dataset.from_list([row | {"subset": "easy"} for row in pairs[:8]])
    bench.to_parquet(folder / "rewardbench.parquet")
    human = datasets.Dataset.from_list(pairs)
    human.save_to_disk(folder / "HumanLLMs/Human-Like-DPO-Dataset")
    (folder / "recipe.yaml").write_text("max_steps: 1\n")
    (folder / "values.yaml").write_text("beta: [0.05, 0.1, 0.5]\n")
    return folder


def environment(clone):
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    extensions = os.environ.get("TORCH_EXTENSIONS_DIR", Path.home() / ".cache/torch_extensions")
    own = {"HOME": str(clone), "PATH": path, "TORCH_EXTENSIONS_DIR": str(extensions)}
    unset = ("ZEROPREF_CACHE", "XDG_CACHE_HOME")
    return {k: v for k, v in os.environ.items() if k not in unset} | own


def typed(command, clone):
    """What a command prints, typed in the clone."""
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=clone,
        env=environment(clone),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, (command, done.stdout[-3000:])
    return done.stdout


def filled(command, row):
    words = [row.words.get(word, word) for word in shlex.split(command) if word != "..."]
    for name, other in row.words.items():
        words = [word.replace(f"/{name}", f"/{other}") for word in words]
    return [*words, *shlex.split(row.added)]


@pytest.mark.slow
def test_they_run(clone):
    """First what stands for itself, the launcher and the model among it, then script by script."""
    launches = dict(rows(Launch))
    late = [command for command in launches if command.startswith(("tensorboard", "python"))]
    for command in [each for each in launches if each not in late] + [None] + late:
        if command is None:
            run_scripts(clone)
            continue
        row = launches[command]
        words = shlex.join(filled(command, row))
        if words.startswith("deepspeed "):
            words = words.replace("deepspeed ", f"deepspeed --master_port {free_port()} ", 1)
        if words.startswith("pip "):
            words = f"cd {ROOT} && {sys.executable} -m {words}"
        text = typed(words, clone)
        assert row.said in text and "does not provide the extra" not in text, (command, text)
    for command, _ in rows(Elsewhere):  # what they name is there
        for word in re.findall(r"runs/\S+", command):
            assert (clone / word / "config.json").is_file(), command


def run_scripts(clone):
    for script in SCRIPTS:
        lines, names = [], []
        for command, row in rows(Run):
            words = [os.path.expanduser(w.replace("~", str(clone))) for w in filled(command, row)]
            if script in words:
                lines.append(words[words.index(script) + 1 :])
                names.append(command)
        many = [sys.executable, "tests/launch/many.py", script, json.dumps(lines)]
        text = typed(shlex.join(many), clone)
        said = re.split(r"^=== (.*)\n=== .*$", text, flags=re.M)[: 2 * len(lines)]  # both streams'
        for command, shown, code in zip(names, said[::2], said[1::2], strict=True):
            assert code == "0", (command, shown[-3000:])


cluster = test_slurm.cluster


@pytest.mark.slow
def test_slurm_takes_them(cluster, clone):
    """As many GPUs as the cluster has; held, so that nothing starts."""
    env = environment(clone) | {k: cluster.env[k] for k in ("SLURM_CONF",)}
    env["PATH"] = f"{env['PATH']}:/usr/sbin"
    for command, _ in rows(Submitted):
        fits = re.sub(r"--gpus-per-node=\d", "--hold --gpus-per-node=1", command)
        fits = fits.replace("--cpus-per-task=64", "--cpus-per-task=1").replace(" ...", "")
        fits = fits.replace("srun ", "srun --test-only ")
        done = subprocess.run(
            ["bash", "-c", fits], cwd=clone, env=env, capture_output=True, text=True
        )
        assert done.returncode == 0, (command, done.stdout, done.stderr)
        if not command.startswith("srun"):
            stages = 3 if "sweep" in command else command.count(" then ") + 1
            held = cluster("squeue", "--noheader", "--array", "--states=PENDING", "--format=%i")
            assert len(held.split()) == stages, (command, held)
            cluster("scancel", "--user=root")
            cluster.until(lambda: not cluster("squeue", "-h"), 60)
