"""What the tests of whole runs share."""

import json

import pytest

from tests.launch.compare import ROOT
from tests.launch.warm import Warm


@pytest.fixture(scope="session")
def warm(tmp_path_factory):
    """Ranks of launch/train_dpo.py without their imports."""
    with Warm(tmp_path_factory.mktemp("cache")) as process:
        yield process


@pytest.fixture(scope="session")
def few(tmp_path_factory):
    """44 pairs: in steps of 8 the epoch's sixth is smaller, and eight steps reach into the second
    epoch.
    """
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    lines = (ROOT / "train/data/builtin/train.jsonl").read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:44]))
    return path


@pytest.fixture(scope="session")
def prompts(tmp_path_factory):
    """24 prompts with a column beside them, and an answer that nobody reads."""
    path = tmp_path_factory.mktemp("data") / "prompts.jsonl"
    lines = (ROOT / "train/data/builtin/prompts.jsonl").read_text().splitlines()[:24]
    rows = [json.loads(line) | {"weight": i % 3, "answer": f"{i}"} for i, line in enumerate(lines)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
