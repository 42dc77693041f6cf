"""Groups of token ids, packed without padding into rows.

A group is a prompt and its k responses, laid out `P A B ...`: the prompt's tokens stand once, every
response continues at position len(P) and sees the prompt and itself only. With one attention
segment a response,

    queries   [P A] [B]            cu_q = [0, P+A, P+A+B]
    keys      [P A] [P B]          cu_k = [0, P+A, P+A+P+B]       gathered by kv_index

causal attention aligned to the bottom right is exactly the mask needed. What is saved against one
padded sequence a response: the padding, and the prompt k - 1 times.

Legend: L tokens in the row, K keys gathered, S attention segments, N responses, T response tokens
scored, G groups.
"""

import hashlib
import heapq
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

DIGEST = 16  # bytes: two of 2^40 sequences share a name with a chance of 2^-49


class Group(NamedTuple):
    """A prompt and its k responses as token ids, and the number of the data row that they come
    from.
    """

    prompt: Sequence[int]  # (P,) token ids; empty for plain text
    responses: tuple[Sequence[int], ...]  # k x (R_i,) token ids, each R_i >= 1
    row: int = -1
    label: bool | None = (
        None  # of a single response that was judged on its own: whether it is desirable
    )

    @property
    def tokens(self) -> int:
        """Tokens that this group takes in a packed row: the prompt once, every response."""
        return len(self.prompt) + sum(map(len, self.responses))


class PackedBatch(NamedTuple):
    """One packed row. N and T are 0 for the empty row that a rank short of groups runs to keep step
    with its peers.
    """

    input_ids: torch.Tensor  # (L,) int64
    positions: torch.Tensor  # (L,) int64, from 0 in each prompt; a response continues at len(P)
    kv_index: (
        torch.Tensor
    )  # (K,) int64 into L: the keys and values of each segment, one after the other
    kv_users: torch.Tensor  # (L, k_max) int64 into K, or K where there is no further user: where each token was gathered to
    cu_q: torch.Tensor  # (S+1,) int32, query offsets of the segments
    cu_k: torch.Tensor  # (S+1,) int32, key offsets of the segments
    hidden_index: (
        torch.Tensor
    )  # (T,) int64 into L: the position whose hidden state predicts the scored token
    target: torch.Tensor  # (T,) int64 token ids
    lengths: torch.Tensor  # (N,) int64, scored tokens of each response
    labels: torch.Tensor | None  # (G,) bool where responses were judged one by one
    digests: tuple[
        bytes, ...
    ]  # N names of what was scored: a hash of the prompt's and the response's ids
    group_rows: tuple[int, ...]  # G numbers of data rows
    shape: tuple[
        tuple[int, ...], ...
    ]  # G x (P, R_1, .. R_k) tokens; the dummy of an empty row included

    @property
    def num_responses(self) -> int:
        """N, responses scored in this row."""
        return self.lengths.shape[0]

    def to(self, device) -> "PackedBatch":
        """The same row with its tensors on `device`; the copies overlap with computation where
        memory is pinned.
        """
        return PackedBatch(
            *(x.to(device, non_blocking=True) if torch.is_tensor(x) else x for x in self)
        )

    def pin(self) -> "PackedBatch":
        """The same row in page-locked memory (needs CUDA)."""
        return PackedBatch(*(x.pin_memory() if torch.is_tensor(x) else x for x in self))

    def sequences(self):
        """Every response alone, the plain way: yields (ids (P+R,), index of the first scored token
        in it).
        """
        start = 0
        for prompt, *responses in self.shape if self.num_responses else ():
            offset = start + prompt
            for length in responses:
                ids = torch.cat(
                    [
                        self.input_ids[start : start + prompt],
                        self.input_ids[offset : offset + length],
                    ]
                )
                yield ids, max(prompt, 1)
                offset += length
            start = offset


def pack(groups: Sequence[Group]) -> PackedBatch:
    """Lay whole groups one after the other. No groups: the empty row of two dummy tokens, of which
    none is scored.

    The first token of a response is predicted at the prompt's last position, which the responses
    share; the first token of plain text (empty prompt) is not predicted by anything and not scored.
    """
    scored = bool(groups)
    groups = groups or [Group((0,), ((0,),))]
    ids, positions, kv, cu_q, cu_k = [], [], [], [0], [0]
    hidden, target, lengths, digests = [], [], [], []
    for group in groups:
        start, prompt = len(ids), len(group.prompt)
        ids += group.prompt
        positions += range(prompt)
        for j, response in enumerate(group.responses):
            first, size = len(ids), len(response)
            if not size:
                raise ValueError(f"row {group.row}: response {j} has no tokens")
            ids += response
            positions += range(prompt, prompt + size)
            kv += [*range(start, start + prompt), *range(first, first + size)]
            cu_q.append(len(ids))
            cu_k.append(len(kv))
            skipped = 0 if prompt else 1
            predicting = [start + prompt - 1, *range(first, first + size - 1)][skipped:]
            hidden += predicting
            target += response[skipped:]
            lengths.append(size - skipped)
            digests.append(digest(group.prompt, response))
    if not scored:
        hidden, target, lengths, digests = [], [], [], []
    long = lambda values: torch.tensor(values, dtype=torch.int64)
    return PackedBatch(
        input_ids=long(ids),
        positions=long(positions),
        kv_index=long(kv),
        kv_users=_users(kv, len(ids)),
        cu_q=torch.tensor(cu_q, dtype=torch.int32),
        cu_k=torch.tensor(cu_k, dtype=torch.int32),
        hidden_index=long(hidden),
        target=long(target),
        lengths=long(lengths),
        labels=_labels(groups),
        digests=tuple(digests),
        group_rows=tuple(group.row for group in groups) if scored else (),
        shape=tuple((len(group.prompt), *map(len, group.responses)) for group in groups),
    )


def _labels(groups):
    """(G,) bool where each group's response was judged on its own; None for pairs and plain text."""
    if groups[0].label is None:
        return None
    return torch.tensor([group.label for group in groups], dtype=torch.bool)


def digest(prompt: Sequence[int], response: Sequence[int]) -> bytes:
    """16 bytes that name a response to a prompt by their token ids, and by where the border between
    the two lies.
    """
    ids = np.array([len(prompt), *prompt, *response], dtype="<i8")
    return hashlib.blake2b(ids.tobytes(), digest_size=DIGEST).digest()


def _users(kv: list[int], tokens: int) -> torch.Tensor:
    """Where in K each of L tokens stands, (L, k_max), padded with K: the transpose of kv_index
    without atomics.
    """
    users = [[] for _ in range(tokens)]
    for place, token in enumerate(kv):
        users[token].append(place)
    widest = max(map(len, users))
    return torch.tensor(
        [places + [len(kv)] * (widest - len(places)) for places in users], dtype=torch.int64
    )


def plan_batches(tokens: Sequence[int], budget: int, world: int = 1) -> list[list[list[int]]]:
    """Share groups out to ranks and rows: `plan[rank][row]` lists indices into `tokens`, the
    groups' sizes.

    Every rank gets the same number of rows, rows hold at most `budget` tokens (a group that is
    larger has a row of its own), and the rows that ranks run at the same time are of about the same
    size. Some may be empty. A pure function, the same on every rank: longest group first, into the
    emptiest row, with few rows a rank.
    """
    if budget < 1:
        raise ValueError(f"a token budget is a positive number, not {budget}")
    order = sorted(range(len(tokens)), key=lambda i: (-tokens[i], i))
    alone = [[i] for i in order if tokens[i] > budget]
    shared = order[len(alone) :]
    halves = sum(2 * tokens[i] > budget for i in shared)  # no two of them share a row
    least = len(alone) + max(halves, -(-sum(tokens[i] for i in shared) // budget))
    count = max(1, -(-least // world)) * world
    while (rows := _fill(shared, tokens, budget, count - len(alone))) is None:
        count += world * max(
            1, count // (50 * world)
        )  # by 2 %, not by one: large sets would try hundreds of times
    rows = alone + rows
    rows.sort(key=lambda row: -sum(tokens[i] for i in row))
    return [[sorted(row) for row in rows[rank::world]] for rank in range(world)]


def _fill(order, tokens, budget, count):
    """Put `order` into `count` rows, each into the emptiest; None when that overfills one."""
    if count < 1:
        return [] if not order and count == 0 else None
    loads = [(0, number) for number in range(count)]
    rows = [[] for _ in range(count)]
    for i in order:
        load, number = heapq.heappop(loads)
        if load + tokens[i] > budget:
            return None
        rows[number].append(i)
        heapq.heappush(loads, (load + tokens[i], number))
    return rows
