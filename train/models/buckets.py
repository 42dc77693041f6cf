"""Packed batches brought to one of a few shapes, for layers that are compiled for each shape.

A batch's L tokens become a multiple of STRIDE by a segment of junk behind them: tokens of the batch
that see themselves and each other only, and that nobody sees. All that a layer is given then has a
size out of a short list: a power of two, or a multiple of the tokens by one. What the body makes of
the junk is cut off at once (backbone.py: packed_hidden), so losses, denominators, metrics and counts
never meet it, and its gradient is zero.

Legend: L tokens, K gathered keys, S attention segments, as in train/data/packing.py; k the most
responses of a prompt.
"""

from typing import NamedTuple

import torch

from train.data.packing import PackedBatch

STRIDE = 512  # tokens by which shapes grow
LEAST_SEGMENTS = 64


class Row(NamedTuple):
    """What the layers need of a packed batch, in the shape of its bucket; fields as PackedBatch's."""

    input_ids: torch.Tensor  # (L,)
    positions: torch.Tensor  # (L,)
    kv_index: torch.Tensor  # (K,), of which those behind cu_k's last are in no segment
    kv_users: torch.Tensor  # (L, k) into K, K for "no further user"
    cu_q: torch.Tensor  # (S+1,), of which the last repeat L: segments of nothing
    cu_k: torch.Tensor  # (S+1,)


class StaticSegments(NamedTuple):
    """What attention.Segments is for a batch as it came, for a Row: without a segment on the host."""

    batch: Row
    max_queries: int  # a bound of all batches of the bucket, not of this one
    max_keys: int
    has_flash: bool
    # Where attention runs in one call over the whole row, which is elsewhere than on CUDA: of each
    # token its group and its response, (L,) int64; a prompt has 0.
    group: torch.Tensor | None
    response: torch.Tensor | None
    deterministic: bool  # as that of Segments; with it nothing is compiled

    def visible(self, window: int) -> torch.Tensor:
        """(L, L) bool: whether a query (row) sees a key (column): of its group's prompt or of its own
        response, not behind it, and within the window where there is one.
        """
        mine = (self.response[:, None] == self.response) | (self.response == 0)
        position = self.batch.positions
        distance = position[:, None] - position
        seen = (self.group[:, None] == self.group) & mine & (distance >= 0)
        return seen & (distance < window) if window > 0 else seen


def bucket_of(batch: PackedBatch) -> dict[str, int]:
    """The sizes of the batch's Row: of L, K, S and k, and the bound of a segment's tokens.

    From the batch's `shape` alone, so the device is not asked.
    """
    tokens = sum(map(sum, batch.shape))
    segments = [prompt + size for prompt, *sizes in batch.shape for size in sizes]
    padded = -(-tokens // STRIDE) * STRIDE
    keys = sum(segments) + padded - tokens
    return {
        "tokens": padded,
        "keys": padded * _power_of_two(-(-keys // padded)),
        "segments": _power_of_two(max(LEAST_SEGMENTS, len(segments) + 1)),
        "users": _power_of_two(batch.kv_users.shape[1]),
        "longest": _power_of_two(max(STRIDE, *segments)),
    }


def _power_of_two(at_least: int) -> int:
    return 1 << (at_least - 1).bit_length()


def static_segments(
    batch: PackedBatch, has_flash: bool, deterministic: bool = False
) -> StaticSegments:
    """The batch in the shape of its bucket. Nothing here waits for the device."""
    bucket = bucket_of(batch)
    tokens, keys = len(batch.input_ids), len(batch.kv_index)
    junk = bucket["tokens"] - tokens

    def longer(x, size, fill):
        return torch.cat([x, fill.expand(size - len(x))]) if size > len(x) else x

    device = batch.input_ids.device
    own = torch.arange(junk, device=device)  # (junk,)
    kv_index = torch.cat([batch.kv_index, tokens + own])
    users = torch.where(batch.kv_users == keys, bucket["keys"], batch.kv_users)
    kv_users = own.new_full((bucket["tokens"], bucket["users"]), bucket["keys"])
    kv_users[:tokens, : users.shape[1]] = users
    kv_users[tokens:, 0] = keys + own
    row = Row(
        # a token that the model knows, and a position that it has
        input_ids=longer(batch.input_ids, bucket["tokens"], batch.input_ids[:1]),
        positions=longer(batch.positions, bucket["tokens"], own.new_zeros(1)),
        kv_index=longer(kv_index, bucket["keys"], own.new_zeros(1)),
        kv_users=kv_users,
        # the junk's segment ends where the row does, and so do those of nothing behind it
        cu_q=longer(batch.cu_q, bucket["segments"] + 1, batch.cu_q[-1:] + junk),
        cu_k=longer(batch.cu_k, bucket["segments"] + 1, batch.cu_k[-1:] + junk),
    )
    longest = bucket["longest"]
    group, response = (None, None) if has_flash else _owners(batch.shape, junk, device)
    return StaticSegments(row, longest, longest, has_flash, group, response, deterministic)


def _owners(shape, junk: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    """(L,) each: the group of every token and its response, from 1 on; the junk is a group of its
    own.
    """
    blocks = [(g, j, size) for g, sizes in enumerate(shape) for j, size in enumerate(sizes)]
    blocks.append((len(shape), 1, junk))
    group, response, sizes = torch.tensor(blocks, device=device).unbind(1)
    total = sum(size for _, _, size in blocks)
    return tuple(x.repeat_interleave(sizes, output_size=total) for x in (group, response))
