"""Tokenizers of tests/tiny.py trained on lines of their own, so that no token here depends on the
built-in pairs.
"""

import datasets
import pytest

from tests import tiny

LINES = "\n".join(
    f"{a} {b} the weather, the answer and the question"
    for a in ("hello", "thanks")
    for b in ("you", "friend")
)


def _train(folder, vocab):
    with pytest.MonkeyPatch.context() as patch:
        (folder / "train/data/builtin").mkdir(parents=True)
        (folder / "train/data/builtin/train.jsonl").write_text(LINES)
        patch.setattr(tiny, "ROOT", folder)
        patch.setattr(tiny, "VOCAB", vocab)
        return tiny.save_tokenizer(folder / "tokenizer")


@pytest.fixture
def letters(tmp_path_factory):
    """A token a byte: 3 control tokens and 256 bytes leave no room for merges. "!" is 3, "A" 35,
    "a" 67, "z" 92.
    """
    return _train(tmp_path_factory.mktemp("letters"), 259)


@pytest.fixture(scope="session")
def merged(tmp_path_factory):
    """The same with merges."""
    return _train(tmp_path_factory.mktemp("merged"), 300)


@pytest.fixture(autouse=True)
def own_caches(tmp_path, monkeypatch):
    monkeypatch.setenv("ZEROPREF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf"))
