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
import itertools
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
    memory: torch.Tensor  # uint8, that the tensors above are views of

    @property
    def num_responses(self) -> int:
        """N, responses scored in this batch."""
        return self.lengths.shape[0]

    def to(self, device) -> "PackedBatch":
        """The same batch with its tensors on `device`: one copy of the memory that they share, which
        overlaps with computation where that memory is pinned.
        """
        memory = self.memory
        moved = memory.to(device, non_blocking=True)
        shared = memory.untyped_storage().data_ptr()

        def on_device(x):
            if x.untyped_storage().data_ptr() != shared:  # put in later
                return x.to(device, non_blocking=True)
            return moved.view(x.dtype).as_strided(x.shape, x.stride(), x.storage_offset())

        return PackedBatch(*(on_device(x) if torch.is_tensor(x) else x for x in self))

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


def pack(groups: Sequence[Group], pin: bool = False) -> PackedBatch:
    """Lay whole groups one after the other. No groups: the empty batch of two dummy tokens, of
    which none is scored. `pin`: in page-locked memory (needs CUDA).

    The first token of a response is predicted at the prompt's last position, which the responses
    share; the first token of plain text (empty prompt) is not predicted by anything and not scored.
    """
    is_empty = not groups
    groups = groups or [Group((0,), ((0,),))]
    ids = _flat_ids(groups)  # (L,)
    blocks = []  # (tokens, position of the first) of each prompt and response, as they lie
    # of each response: tokens of its prompt and of itself, where both begin, its place in the group
    responses = []
    digests = []
    start = 0
    for group in groups:
        prompt = len(group.prompt)
        prompt_ids = ids[start : start + prompt]
        blocks.append((prompt, 0))
        offset = start + prompt
        for j, response in enumerate(group.responses):
            size = len(response)
            if not size:
                raise ValueError(f"row {group.row}: response {j} has no tokens")
            blocks.append((size, prompt))
            responses.append((prompt, size, start, offset, j))
            digests.append(_digest(prompt_ids, ids[offset : offset + size]))
            offset += size
        start = offset
    block_sizes, first_positions = np.array(blocks, dtype=np.int64).T
    prompts, sizes, starts, offsets, places = np.array(responses, dtype=np.int64).T  # (N,) each
    num_keys = np.cumsum(prompts + sizes)  # (N,)
    kv_index = _ranges(_in_turn(starts, offsets), _in_turn(prompts, sizes))  # (K,)
    # Position start + prompt - 1 predicts the first token: there is none without a prompt.
    has_prompt = np.minimum(prompts, 1)  # (N,)
    lengths = sizes - 1 + has_prompt  # (N,)
    hidden_index = _ranges(
        _in_turn(starts + prompts - 1, offsets), _in_turn(has_prompt, sizes - 1)
    )  # (T,)
    target = ids[_ranges(offsets + 1 - has_prompt, lengths)]  # (T,)
    if is_empty:
        hidden_index = target = lengths = np.zeros(0, dtype=np.int64)
        digests = []
    tensors = _in_one_memory(
        pin,
        input_ids=ids,
        positions=_ranges(first_positions, block_sizes),
        kv_index=kv_index,
        kv_users=_kv_users(kv_index, len(ids), prompts, sizes, places),
        cu_q=np.concatenate([[0], offsets + sizes]).astype(np.int32),
        cu_k=np.concatenate([[0], num_keys]).astype(np.int32),
        hidden_index=hidden_index,
        target=target,
        lengths=lengths,
        labels=_column(groups, "label", bool),
        targets=_column(groups, "target", np.float64),
    )
    return PackedBatch(
        **tensors,
        digests=tuple(digests),
        group_rows=() if is_empty else tuple(group.row for group in groups),
        shape=tuple((len(group.prompt), *map(len, group.responses)) for group in groups),
    )


def _flat_ids(groups: Sequence[Group]) -> np.ndarray:
    """(L,) int64: the token ids of all groups, as they lie in the batch."""
    parts = itertools.chain.from_iterable((group.prompt, *group.responses) for group in groups)
    tokens = sum(group.tokens for group in groups)
    return np.fromiter(itertools.chain.from_iterable(parts), np.int64, tokens)


def _ranges(starts: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """The integers from starts[i] on, sizes[i] of them, one range after the other."""
    ends = np.cumsum(sizes)
    return np.repeat(starts - ends + sizes, sizes) + np.arange(ends[-1])


def _in_turn(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """first[0], second[0], first[1], second[1], ..."""
    return np.stack([first, second], axis=1).ravel()


def _kv_users(kv_index, num_tokens, prompts, sizes, places) -> np.ndarray:
    """Where in K each of L tokens stands, (L, k_max) int64, padded with K.

    The transpose of kv_index: with it the backward of the gather is a gather too, without the
    atomics whose order makes a sum's last digits vary from run to run. prompts, sizes, places (N,):
    tokens of each response's prompt and of itself, and its place in its group.
    """
    num_keys = len(kv_index)
    k_max = 1 + places[prompts > 0].max(initial=0)
    users = np.full((num_tokens, k_max), num_keys, dtype=np.int64)
    # a prompt's token is a key of each response, the j-th of which it notes in column j
    columns = np.repeat(_in_turn(places, np.zeros_like(places)), _in_turn(prompts, sizes))  # (K,)
    users[kv_index, columns] = np.arange(num_keys)
    return users


def _column(groups: Sequence[Group], name: str, dtype) -> np.ndarray | None:
    """(G,) of the groups' labels or targets; None where they have none."""
    if getattr(groups[0], name) is None:
        return None
    return np.array([getattr(group, name) for group in groups], dtype=dtype)


def _in_one_memory(pin: bool, **arrays: np.ndarray | None) -> dict[str, torch.Tensor | None]:
    """The arrays as tensors that are views of one, `memory`, so that a single copy brings all of them
    to a device; None stays None.
    """
    given = {name: array for name, array in arrays.items() if array is not None}
    # each begins at a multiple of 8 bytes, where every type may
    sizes = [-(-array.nbytes // 8) * 8 for array in given.values()]
    memory = torch.empty(sum(sizes), dtype=torch.uint8)
    if pin:
        memory = memory.pin_memory()
    raw = memory.numpy()
    tensors = dict.fromkeys(arrays) | {"memory": memory}
    start = 0
    for (name, array), size in zip(given.items(), sizes, strict=True):
        end = start + array.nbytes
        raw[start:end].view(array.dtype)[:] = array.ravel()
        dtype = torch.bool if array.dtype == bool else getattr(torch, array.dtype.name)
        tensors[name] = memory[start:end].view(dtype).view(array.shape)
        start += size
    return tensors


def digest(prompt: Sequence[int], response: Sequence[int]) -> bytes:
    """16 bytes that name a response to a prompt by their token ids, and by where the border between
    the two lies.
    """
    return _digest(np.array(prompt, dtype=np.int64), np.array(response, dtype=np.int64))


def _digest(prompt: np.ndarray, response: np.ndarray) -> bytes:
    """`digest` of arrays of int64."""
    ids = np.concatenate([[len(prompt)], prompt, response]).astype("<i8", copy=False)
    return hashlib.blake2b(ids.tobytes(), digest_size=DIGEST).digest()


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
