"""What an epoch takes of each source (a share of its rows, others in each epoch), and in which order.

Of a source's n rows an epoch takes c, its share times n, rounded. Epochs come in cycles of
ceil(n / c), for each of which the rows are shuffled: its epochs take c after c of them, and the last
one goes on at their beginning. So no row comes twice in an epoch, and every row comes once or twice
in a cycle. What is drawn is a function of (seed, epoch, place of the source), on any number of ranks.
"""

import math
import os
import re
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from train.data.dataset import Tokenised
from train.data.sources import COMPRESSED, READERS, suffix_of


def shuffled(count: int, seed: int, epoch: int) -> np.ndarray:
    """The epoch's order: a permutation of range(count), (count,) int64, from numpy's counter-based
    Philox.
    """
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(count)


class Sources(NamedTuple):
    """The sources of a data set that have a sound row, in order."""

    names: tuple[str, ...]  # short ones, each its own
    firsts: np.ndarray  # (S,) int64 number of each one's first row over all sources

    @property
    def several(self) -> tuple[str, ...]:
        """The names; none where there is but one source."""
        return self.names if len(self.names) > 1 else ()

    def split(self, rows: Sequence[int]) -> list[np.ndarray]:
        """The places in `rows` of each of `several`'s rows."""
        places = self.of(rows)
        return [np.flatnonzero(places == i) for i in range(len(self.several))]

    def of(self, rows: Sequence[int]) -> np.ndarray:
        """The places of the sources that rows belong to, by their numbers over all sources: (N,)."""
        return np.searchsorted(self.firsts, np.asarray(rows, np.int64), side="right") - 1


class Part(NamedTuple):
    """One source's part of the data that is trained on."""

    name: str
    source: str  # as the user named it, without the share
    share: Fraction
    groups: np.ndarray  # (n,) int64 numbers into the data set

    @property
    def count(self) -> int:
        """Groups that an epoch takes: the share, a half rounded up, and one where there is any."""
        n = len(self.groups)
        return min(n, max(1, math.floor(self.share * n + Fraction(1, 2))))

    def drawn(self, place: int, seed: int, epoch: int) -> np.ndarray:
        """The groups that an epoch takes, (count,). place: of the source among all."""
        n, c = len(self.groups), self.count
        if c == n:
            return self.groups
        cycle, within = divmod(epoch, -(-n // c))
        # `shuffled` has the counters that begin with 0
        bits = np.random.Philox(key=[seed, cycle], counter=[0, 0, 0, 1 + place])
        order = np.random.Generator(bits).permutation(n)
        return self.groups[order[np.arange(within * c, (within + 1) * c) % n]]


class Mix(NamedTuple):
    """What an epoch is made of."""

    parts: tuple[Part, ...]  # of each source

    @property
    def count(self) -> int:
        """Groups that an epoch takes of all sources."""
        return sum(part.count for part in self.parts)

    @property
    def is_whole(self) -> bool:
        """Whether an epoch takes everything."""
        return all(part.count == len(part.groups) for part in self.parts)

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """The epoch's groups in its order, (count,): what is drawn of the sources, shuffled together."""
        if self.is_whole:
            return shuffled(self.count, seed, epoch)
        drawn = [part.drawn(i, seed, epoch) for i, part in enumerate(self.parts)]
        return np.concatenate(drawn)[shuffled(self.count, seed, epoch)]

    def draws(self) -> list[list[int]] | None:
        """[groups that an epoch takes, groups that there are] of each source; None of the whole."""
        return None if self.is_whole else [[p.count, len(p.groups)] for p in self.parts]

    def described(self) -> dict[str, dict]:
        """What run.json says of each source, by name."""
        return {
            part.name: {
                "source": part.source,
                "share": float(part.share),
                "groups": len(part.groups),
                "groups_an_epoch": part.count,
            }
            for part in self.parts
        }

    def lines(self) -> list[str]:
        """What the terminal says, a line a source; nothing of a single one that is taken whole."""
        if self.is_whole and len(self.parts) < 2:
            return []
        return [
            f"{part.name}: {part.count:,} of {len(part.groups):,} rows an epoch"
            + (f" (share {float(part.share):g})" if part.share < 1 else "")
            for part in self.parts
        ]


def sources_of(data: Tokenised) -> Sources:
    """The sources of a data set, or of a view of one."""
    names = short_names([source for source, _ in data.starts])
    return Sources(tuple(names), np.array([first for _, first in data.starts], np.int64))


def places_by_source(data: Tokenised) -> dict[str, np.ndarray]:
    """The groups of each source by its name; {} where there is but one source."""
    sources = sources_of(data)
    found = zip(sources.several, sources.split(data.rows), strict=True)
    return {name: index for name, index in found if len(index)}


def mix_of(data: Tokenised) -> Mix:
    """What an epoch over a data set, or over a view of one, is made of."""
    sources = sources_of(data)
    places = sources.of(data.rows)
    shares = data.shares or [Fraction(1)] * len(data.starts)
    named = zip(sources.names, data.starts, shares, strict=True)
    return Mix(
        tuple(
            Part(name, source, share, np.flatnonzero(places == i))
            for i, (name, (source, _), share) in enumerate(named)
        )
    )


def by_source(data: Tokenised) -> dict[str, dict]:
    """What run.json says of each source of rows that are held out, by name."""
    sources = sources_of(data)
    counts = np.bincount(sources.of(data.rows), minlength=len(sources.names)).tolist()
    named = zip(sources.names, data.starts, counts, strict=True)
    return {name: {"source": source, "groups": n} for name, (source, _), n in named}


def short_names(sources: Sequence[str]) -> list[str]:
    """A name for each source, to stand in the tags of a board: of a file its name without what it
    ends in, of a data set on the hub what follows the organisation; a second one is called NAME-2.
    """
    names = []
    for source in sources:
        name = os.path.basename(os.path.normpath(source))
        if suffix_of(name) in READERS:
            root, ending = os.path.splitext(name)
            name = os.path.splitext(root)[0] if ending.lower() in COMPRESSED else root
        else:
            name = re.split("[:@]", name)[0]
        name = re.sub(r"[^\w.-]+", "_", name) or "data"
        number = 1
        unique = name
        while unique in names:
            number += 1
            unique = f"{name}-{number}"
        names.append(unique)
    return names
