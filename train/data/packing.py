"""Groups of token ids, packed without padding into batches.

A group is a prompt and its k responses, laid out `P A B ...`: the prompt's tokens stand once, every
response continues at position len(P) and sees the prompt and itself only. With one attention
segment a response,

    queries   [P A] [B]            cu_q = [0, P+A, P+A+B]
    keys      [P A] [P B]          cu_k = [0, P+A, P+A+P+B]       gathered by kv_index

causal attention aligned to the bottom right is exactly the mask needed. What is saved against one
padded sequence a response: the padding, and the prompt k - 1 times.

Legend: L tokens in the batch, K keys gathered, S attention segments, N responses, T response tokens
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
    # Of a single response that was judged on its own: whether it is desirable.
    label: bool | None = None
    # What a score model is to learn: by how much chosen is better, or a single answer's score.
    target: float | None = None

    @property
    def tokens(self) -> int:
        """Tokens that this group takes in a packed batch: the prompt once, every response."""
        return len(self.prompt) + sum(map(len, self.responses))


class PackedBatch(NamedTuple):
    """A packed micro-batch. N and T are 0 for the empty batch that a rank short of groups runs to
    keep step with its peers.
    """

    input_ids: torch.Tensor  # (L,) int64
    positions: torch.Tensor  # (L,) int64, from 0 in each prompt; a response continues at len(P)
    # (K,) int64 into L: the keys and values of each segment, one segment after the other.
    kv_index: torch.Tensor
    # (L, k_max) int64 into K: where each token was gathered to; K where there is no further user.
    kv_users: torch.Tensor
    cu_q: torch.Tensor  # (S+1,) int32, query offsets of the segments
    cu_k: torch.Tensor  # (S+1,) int32, key offsets of the segments
    # (T,) int64 into L: the position whose hidden state predicts the scored token.
    hidden_index: torch.Tensor
    target: torch.Tensor  # (T,) int64 token ids
    lengths: torch.Tensor  # (N,) int64, scored tokens of each response
    labels: torch.Tensor | None  # (G,) bool where responses were judged one by one
    targets: torch.Tensor | None  # (G,) float64 where the data has numbers to learn
    # N names of what was scored: a hash of the prompt's and the response's ids.
    digests: tuple[bytes, ...]
    group_rows: tuple[int, ...]  # G numbers of data rows
    # G x (P, R_1, .. R_k) tokens; the dummy of an empty batch included.
    shape: tuple[tuple[int, ...], ...]

    @property
    def num_responses(self) -> int:
        """N, responses scored in this batch."""
        return self.lengths.shape[0]

    def to(self, device) -> "PackedBatch":
        """The same batch with its tensors on `device`; the copies overlap with computation where
        memory is pinned.
        """
        return PackedBatch(
            *(x.to(device, non_blocking=True) if torch.is_tensor(x) else x for x in self)
        )

    def pin(self) -> "PackedBatch":
        """The same batch in page-locked memory (needs CUDA)."""
        return PackedBatch(*(x.pin_memory() if torch.is_tensor(x) else x for x in self))

    def sequences(self):
        """Yield every response alone, the plain way: (ids (P+R,), index of the first scored token)."""
        start = 0
        for prompt, *responses in self.shape if self.num_responses else ():
            offset = start + prompt
            for length in responses:
                prompt_ids = self.input_ids[start : start + prompt]
                response_ids = self.input_ids[offset : offset + length]
                # Nothing predicts the first token of plain text, which has no prompt.
                yield torch.cat([prompt_ids, response_ids]), max(prompt, 1)
                offset += length
            start = offset


def pack(groups: Sequence[Group]) -> PackedBatch:
    """Lay whole groups one after the other. No groups: the empty batch of two dummy tokens, of
    which none is scored.

    The first token of a response is predicted at the prompt's last position, which the responses
    share; the first token of plain text (empty prompt) is not predicted by anything and not scored.
    """
    is_empty = not groups
    groups = groups or [Group((0,), ((0,),))]
    ids, positions = [], []
    kv_index, cu_q, cu_k = [], [0], [0]
    hidden_index, target, lengths, digests = [], [], [], []
    for group in groups:
        start = len(ids)
        prompt = len(group.prompt)
        ids += group.prompt
        positions += range(prompt)
        for j, response in enumerate(group.responses):
            offset = len(ids)
            size = len(response)
            if not size:
                raise ValueError(f"row {group.row}: response {j} has no tokens")
            ids += response
            positions += range(prompt, prompt + size)
            kv_index += [*range(start, start + prompt), *range(offset, offset + size)]
            cu_q.append(len(ids))
            cu_k.append(len(kv_index))
            # Position start + prompt - 1 predicts the first token: there is none without a prompt.
            skipped = 0 if prompt else 1
            hidden_index += [start + prompt - 1, *range(offset, offset + size - 1)][skipped:]
            target += response[skipped:]
            lengths.append(size - skipped)
            digests.append(digest(group.prompt, response))
    if is_empty:
        hidden_index, target, lengths, digests = [], [], [], []
    return PackedBatch(
        input_ids=_int64(ids),
        positions=_int64(positions),
        kv_index=_int64(kv_index),
        kv_users=_kv_users(kv_index, len(ids)),
        cu_q=torch.tensor(cu_q, dtype=torch.int32),
        cu_k=torch.tensor(cu_k, dtype=torch.int32),
        hidden_index=_int64(hidden_index),
        target=_int64(target),
        lengths=_int64(lengths),
        labels=_labels(groups),
        targets=_targets(groups),
        digests=tuple(digests),
        group_rows=() if is_empty else tuple(group.row for group in groups),
        shape=tuple((len(group.prompt), *map(len, group.responses)) for group in groups),
    )


def _int64(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


def _labels(groups: Sequence[Group]) -> torch.Tensor | None:
    """(G,) bool where each group's response was judged on its own; None for pairs and plain text."""
    if groups[0].label is None:
        return None
    return torch.tensor([group.label for group in groups], dtype=torch.bool)


def _targets(groups: Sequence[Group]) -> torch.Tensor | None:
    """(G,) float64 of the groups' targets; None where they have none."""
    if groups[0].target is None:
        return None
    return torch.tensor([group.target for group in groups], dtype=torch.float64)


def digest(prompt: Sequence[int], response: Sequence[int]) -> bytes:
    """16 bytes that name a response to a prompt by their token ids, and by where the border between
    the two lies.
    """
    ids = np.array([len(prompt), *prompt, *response], dtype="<i8")
    return hashlib.blake2b(ids.tobytes(), digest_size=DIGEST).digest()


def _kv_users(kv_index: list[int], tokens: int) -> torch.Tensor:
    """Where in K each of L tokens stands, (L, k_max) int64, padded with K.

    The transpose of kv_index: with it the backward of the gather is a gather too, without the
    atomics whose order makes a sum's last digits vary from run to run.
    """
    users = [[] for _ in range(tokens)]
    for key, token in enumerate(kv_index):
        users[token].append(key)
    k_max = max(map(len, users))
    return _int64([keys + [len(kv_index)] * (k_max - len(keys)) for keys in users])


def plan_batches(tokens: Sequence[int], batch_tokens: int, world: int = 1) -> list[list[list[int]]]:
    """Deal groups to ranks and batches: `plan[rank][batch]` lists indices into `tokens`, the
    groups' sizes.

    Every rank gets the same number of batches, batches hold at most `batch_tokens` tokens (a group
    that is larger has a batch of its own), and the batches that ranks run at the same time are of
    about the same size. Some may be empty. A pure function, the same on every rank: longest group
    first, into the emptiest batch, with few batches a rank.
    """
    if batch_tokens < 1:
        raise ValueError(f"a token budget is a positive number, not {batch_tokens}")
    longest_first = sorted(range(len(tokens)), key=lambda i: (-tokens[i], i))
    oversized = [[i] for i in longest_first if tokens[i] > batch_tokens]
    fitting = longest_first[len(oversized) :]
    # A lower bound of the number of batches: no two groups over half a batch share one.
    over_half = sum(2 * tokens[i] > batch_tokens for i in fitting)
    by_volume = -(-sum(tokens[i] for i in fitting) // batch_tokens)
    at_least = len(oversized) + max(over_half, by_volume)
    count = max(1, -(-at_least // world)) * world
    while (filled := _fill(fitting, tokens, batch_tokens, count - len(oversized))) is None:
        # By 2 %, not by one: large sets would try hundreds of times.
        count += world * max(1, count // (50 * world))
    batches = oversized + filled
    batches.sort(key=lambda batch: -sum(tokens[i] for i in batch))
    return [[sorted(batch) for batch in batches[rank::world]] for rank in range(world)]


def _fill(
    order: Sequence[int], tokens: Sequence[int], batch_tokens: int, count: int
) -> list[list[int]] | None:
    """Put the groups `order` into `count` batches, each into the emptiest; None when that overfills
    one.
    """
    if count < 1:
        return [] if not order and count == 0 else None
    loads = [(0, number) for number in range(count)]  # a heap of (tokens, number of the batch)
    batches = [[] for _ in range(count)]
    for i in order:
        load, number = heapq.heappop(loads)
        if load + tokens[i] > batch_tokens:
            return None
        batches[number].append(i)
        heapq.heappush(loads, (load + tokens[i], number))
    return batches
