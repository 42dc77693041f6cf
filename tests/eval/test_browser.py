"""TensorBoard in a real browser, headless: the pages load and name our tags."""

import functools
import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import numpy as np
import pytest

from eval import baselines, board, distribution, figures, generations, preferences, report
from eval.scores import Scores
from eval.verdict import verdict
from tests.launch.commands import free_port
from train.losses import composition
from train.methods import answers
from train.models.generate import Completion
from train.run.tensorboard import Board

DRIVER = shutil.which("chromedriver")  # it speaks WebDriver: plain HTTP
# A page of TensorBoard, and what stands on it of ours.
PAGES = {
    "scalars": [
        "eval/rewards/margins",
        "eval/rewards/accuracies",
        "eval/loss",
        "evaluation_distribution",
    ],
    "histograms": ["eval/histogram/margins", "eval/histogram/reference/logps_chosen"],
    "text": ["eval/report", "eval/generations/greedy", "Against the reference", "Fine, and you?"],
    "custom_scalars": ["overview: train, val and eval", "margin", "log-prob of rejected"],
    "pr_curves": ["eval/pr/chosen_or_rejected"],
}
# All text of the page, that of its components' shadow trees too.
TEXT = """
const text = node => node.nodeType === 3 ? node.textContent + " " : ["STYLE", "SCRIPT"].includes(node.tagName) ? "" :
  (node.shadowRoot ? text(node.shadowRoot) : "") + [...node.childNodes].map(text).join("");
return text(document.body);
"""


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    """The folder of a training run, and of an evaluation in it, of made-up numbers."""
    folder = tmp_path_factory.mktemp("logs")
    rng, n = np.random.default_rng(0), 40  # pairs, and texts
    training = Board(folder / "tensorboard", total=0, quiet=True)
    for step in range(6):
        values = {"rewards/margins": 0.1 * step, "rewards/accuracies": 0.5 + 0.05 * step}
        training.scalars(values, step, "train/")
    training.close()

    def scores(k, mean):
        lengths = rng.integers(20, 60, (n, k))
        tokens = -rng.exponential(mean, (2, lengths.sum())).astype(np.float32)
        starts = np.cumsum(lengths) - lengths.reshape(-1)
        sums = np.add.reduceat(tokens.astype(float), starts, axis=1)
        return Scores(
            rows=np.arange(n),
            prompts=np.arange(n),
            lengths=lengths,
            sums=sums.reshape(2, n, k),
            tokens=tokens,
        )

    pairs, texts = scores(2, 3), scores(1, 4)
    preferred, columns = preferences.measure(pairs, composition.choose("sigmoid", 0.1, {}))
    chosen = [f"warm kitchen {i}" for i in range(n)]
    rejected = [f"office form {i}" for i in range(n)]
    trivial, _ = baselines.measure(chosen, rejected, columns["prompt"], columns["correct"])
    apart, _ = distribution.measure(pairs, texts, ["model", "reference"])
    row = {"row": 0, "prompt": "How are you?"}
    for key in ("greedy/reference", "greedy/model", "sampled/reference", "sampled/model"):
        row |= {f"{key}/text": "Fine, and you?", f"{key}/ended": 1.0}
    summary = answers.summary(
        {"length": [3.0] * n, "ended": [1.0] * n, "repetition": [0.0] * n},
        [Completion((1, 2, 3), ended=False)] * n,
    )
    modes = {mode: {"model": summary, "reference": summary} for mode in generations.MODES}
    written = modes | {
        "prompts": 1,
        "max_new_tokens": 8,
        "temperature": 1.0,
        "seed": 0,
        "examples": [row],
    }
    described = {"sources": ["some.jsonl"], "groups": n, "dropped": 0, "truncated": 0}
    recipe = {
        "beta": 0.1,
        "max_length": 512,
        "max_prompt_length": 128,
        "layout": "packed",
        "from": None,
    }
    content = {
        "model": "run/model",
        "reference": "start",
        "trained": None,
        "recipe": recipe,
        "data": described,
        "ood": described,
        "preferences": preferred,
        "baselines": trivial,
        "distribution": apart,
        "generations": written,
        "run": {"precision": "fp32"},
        "verdict": verdict(preferred, trivial, apart, written, unchanged=False),
    }
    drawn = figures.draw(folder / "figures", content, {"pairs": columns})
    pages = {
        "report": report.markdown(content, []),
        "generations/greedy": "\n".join(report.samples([row], "greedy")),
    }
    values = board.histograms(columns, pairs, texts, ["model", "reference"])
    board.write(folder / "eval/tensorboard", content, board.Shown(pages, values, drawn), step=6)
    return folder


@pytest.fixture(scope="module")
def address(logs):
    """Where TensorBoard answers with both runs loaded."""
    port = free_port()
    root = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(logs)]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until(lambda: len(json.load(urllib.request.urlopen(f"{root}/data/runs", timeout=10))) == 2)
        yield root
    finally:
        server.terminate()
        server.wait(30)


@pytest.fixture(scope="module")
def ask():
    """A browser: `ask(path, **what)` of its session, by WebDriver."""
    port = free_port()
    driver = subprocess.Popen(
        [DRIVER, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    root = f"http://127.0.0.1:{port}/session"

    def send(path="", **what):
        request = urllib.request.Request(
            f"{root}{path}", json.dumps(what).encode(), {"Content-Type": "text/json"}
        )
        with urllib.request.urlopen(request, timeout=200) as answer:
            return json.load(answer)["value"]

    options = {
        "args": ["--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1400,2600"]
    }
    try:
        until(lambda: socket.create_connection(("127.0.0.1", port), 1).close() is None)
        session = send(capabilities={"alwaysMatch": {"goog:chromeOptions": options}})["sessionId"]
        yield lambda path, **what: send(f"/{session}{path}", **what)
        urllib.request.urlopen(
            urllib.request.Request(f"{root}/{session}", method="DELETE"), timeout=60
        )
    finally:
        driver.terminate()
        driver.wait(30)


def until(done, seconds=120):
    """Wait until `done()` is true; what it may raise meanwhile is that nobody answers yet."""
    for _ in range(seconds):
        try:
            if done():
                return
        except OSError:
            pass
        time.sleep(1)
    pytest.fail(f"not within {seconds} s")


@pytest.mark.slow
@pytest.mark.skipif(DRIVER is None, reason="needs chromium and chromedriver")
def test_pages_load_with_our_tags(address, ask):
    for page, expected in PAGES.items():
        ask("/url", url="about:blank")  # else only the fragment would change
        ask("/url", url=f"{address}/#{page}")
        until(functools.partial(_shows, ask, expected))


def _shows(ask, expected):
    """Whether all these texts stand on the page by now."""
    shown = ask("/execute/sync", script=TEXT, args=[])
    return all(text in shown for text in expected)
