"""A tokenised data set: groups by number, mapped from disk, and its split by prompt."""

import dataclasses
import hashlib
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from train.data.errors import DataError
from train.data.packing import Group
from train.data.plausible import Suspicion


@dataclasses.dataclass(frozen=True)
class Tokenised:
    """N groups of up to k responses in flat storage, memory-mapped; `select` gives views that share
    it.
    """

    ids: np.ndarray  # (T,) int32: prompt, response, response, prompt, ...
    offsets: np.ndarray  # (N,) int64 into ids: where each group's prompt begins
    # (N, 1 + k) int32 tokens of the prompt and of each response; 0 where a group has fewer than k
    lengths: np.ndarray
    truncated: np.ndarray  # (N, 1 + k) bool: which of them were cut
    rows: np.ndarray  # (N,) int64 number of the row over all sources
    # (N,) int64 hash of the prompt's messages, or of a plain text; no template or truncation in it.
    prompts: np.ndarray
    dropped: list  # of Dropped, of all sources, also in a view
    fingerprint: str  # sha256 of what went in, as hex; a view's covers the selection
    labels: np.ndarray | None = None  # (N,) bool, of answers that were judged one by one
    targets: np.ndarray | None = None  # (N,) float64, what a score model is to learn
    starts: tuple = ()  # (source, number of its first row over all sources), in order
    # of each of `starts`, what an epoch takes of it (data/mixing.py); (): everything
    shares: tuple[Fraction, ...] = ()
    remarks: tuple = ()  # (how rows were read or rendered, number of rows), worth saying once
    suspicions: tuple[Suspicion, ...] = ()  # rows that nobody can have meant, by sort
    # (N,) int64 hash of the prompt's and the answers' texts, whatever the kind of data and tokenizer
    contents: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.offsets)

    def group(self, i: int) -> Group:
        """Group i as tuples of Python ints. Raises IndexError."""
        prompt, *lengths = self.lengths[i].tolist()
        start = int(self.offsets[i])
        ids = tuple(self.ids[start : start + prompt + sum(lengths)].tolist())
        responses = []
        offset = prompt
        for length in filter(None, lengths):
            responses.append(ids[offset : offset + length])
            offset += length
        label = None if self.labels is None else bool(self.labels[i])
        target = None if self.targets is None else float(self.targets[i])
        return Group(ids[:prompt], tuple(responses), int(self.rows[i]), label, target)

    def place(self, i: int) -> tuple[str, int]:
        """(source as the user named it, number of the row within it) of group i."""
        number = int(self.rows[i])
        source, first = next(start for start in reversed(self.starts) if start[1] <= number)
        return source, number - first

    def notes(self) -> list[str]:
        """What is to be said of the data, a line each: how rows were read, what the chat template
        made of them, how many were cut, and which are implausible.
        """
        lines = [
            f"{remark} ({count:,} {'row' if count == 1 else 'rows'})"
            for remark, count in self.remarks
        ]
        if len(self) and self.truncated.any():
            prompts = int(self.truncated[:, 0].sum())
            answers = int(self.truncated[:, 1:].any(axis=1).sum())
            lines.append(
                f"cut to the length limits: the prompt of {prompts:,} ({prompts / len(self):.1%}) and "
                f"an answer of {answers:,} ({answers / len(self):.1%}) of {len(self):,} rows"
            )
        return lines + [f"implausible: {suspicion}" for suspicion in self.suspicions]

    def select(self, indices: Sequence[int]) -> "Tokenised":
        """A view of the groups `indices`, in that order. Raises IndexError."""
        index = np.asarray(indices, dtype=np.int64).reshape(-1)
        digest = hashlib.sha256(self.fingerprint.encode() + index.tobytes()).hexdigest()
        per_group = ["offsets", "lengths", "truncated", "rows", "prompts", "labels", "targets"]
        per_group += ["contents"]
        columns = {name: getattr(self, name) for name in per_group}
        selected = {name: column[index] for name, column in columns.items() if column is not None}
        return dataclasses.replace(self, fingerprint=digest, **selected)


def split_by_prompt(tokenised: Tokenised, share: float, seed: int) -> tuple[Tokenised, Tokenised]:
    """(train, held out): about `share` of the distinct prompts are held out.

    A prompt's side depends on the seed and the prompt alone: not on the other rows, their order,
    the template or the lengths. Raises ValueError for a share outside [0, 1); DataError when a side
    would be empty though share > 0.
    """
    if not 0 <= share < 1:
        raise ValueError(f"the share of held-out prompts is {share}; expected 0 <= share < 1")
    distinct, inverse = np.unique(tokenised.prompts, return_inverse=True)
    # Uniform in [0, 1) and a function of seed and prompt alone.
    draws = [
        int.from_bytes(sha256_of_text(f"{seed}:{prompt}")[:8], "big") / 2**64
        for prompt in distinct.tolist()
    ]
    held_out = (np.array(draws) < share)[inverse.reshape(-1)]  # (N,) bool
    if share > 0 and (held_out.all() or not held_out.any()):
        lacking = "none to train on" if held_out.any() else "none held out"
        raise DataError(
            f"holding out {share:.1%} of {len(distinct)} distinct prompts leaves {lacking}: take another share or seed,"
            " or name held-out data of its own"
        )
    return tokenised.select(np.flatnonzero(~held_out)), tokenised.select(np.flatnonzero(held_out))


def sha256_of_text(text: str) -> bytes:
    """The sha256 of a text; halves of surrogate pairs, which JSON's \\ud800 makes, count too."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
