"""Packed batches by hand, and what every deal of groups to ranks and batches must keep."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from train.data.mixing import shuffled
from train.data.packing import Group, PackedBatch, digest, pack, plan_batches
from train.data.steps import num_steps, plan_pass, plan_steps


def test_batch_by_hand():
    # P = 7 8, A = 1 2 3, B = 4; then plain text 9 5
    batch = pack([Group((7, 8), ((1, 2, 3), (4,)), row=11), Group((), ((9, 5),), row=12)])
    assert batch.input_ids.tolist() == [7, 8, 1, 2, 3, 4, 9, 5]
    assert batch.positions.tolist() == [0, 1, 2, 3, 4, 2, 0, 1]
    assert batch.cu_q.tolist() == [0, 5, 6, 8]  # [P A] [B] [text]
    assert batch.cu_k.tolist() == [0, 5, 8, 10]  # [P A] [P B] [text]
    assert batch.kv_index.tolist() == [0, 1, 2, 3, 4, 0, 1, 5, 6, 7]
    # 8 predicts 1 and 4; 1 predicts 2; 2 predicts 3; 9 predicts 5; nothing predicts 9
    assert batch.hidden_index.tolist() == [1, 2, 3, 1, 6]
    assert batch.target.tolist() == [1, 2, 3, 4, 5]
    assert batch.digests == (digest((7, 8), (1, 2, 3)), digest((7, 8), (4,)), digest((), (9, 5)))
    assert batch.lengths.tolist() == [3, 1, 1]
    assert batch.kv_users.tolist() == [
        [0, 5],
        [1, 6],
        [2, 10],
        [3, 10],
        [4, 10],
        [7, 10],
        [8, 10],
        [9, 10],
    ]
    assert batch.group_rows == (11, 12)
    assert [(ids.tolist(), first) for ids, first in batch.sequences()] == [
        ([7, 8, 1, 2, 3], 2),
        ([7, 8, 4], 2),
        ([9, 5], 1),
    ]


def test_digests_tell_ids_and_borders_apart():
    same = digest((1, 2), (3, 4))
    assert same == digest([1, 2], [3, 4]) and len(same) == 16
    others = [
        digest((1,), (2, 3, 4)),
        digest((1, 2), (3, 5)),
        digest((1, 2), (4, 3)),
        digest((2, 1, 2), (3, 4)),
        digest((), (1, 2, 3, 4)),
        digest((2,), (1, 2, 3, 4)),
    ]
    assert len({same, *others}) == 7


def test_empty_batch_scores_nothing():
    batch = pack([])
    assert batch.input_ids.shape == (2,) and batch.num_responses == 0 and batch.target.numel() == 0
    assert list(batch.sequences()) == [] and batch.group_rows == ()


def test_empty_response_is_refused_with_its_row():
    with pytest.raises(ValueError, match="row 5: response 1 has no tokens"):
        pack([Group((1,), ((2,), ()), row=5)])


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 400), max_size=40), st.integers(50, 900), st.integers(1, 5))
def test_plans_keep_every_group_once_and_batches_even(tokens, budget, world):
    plan = plan_batches(tokens, budget, world)
    assert len(plan) == world
    assert len({len(batches) for batches in plan}) == 1 and len(plan[0]) >= 1
    assert sorted(i for batches in plan for batch in batches for i in batch) == list(
        range(len(tokens))
    )
    for batches in plan:
        for batch in batches:
            assert sum(tokens[i] for i in batch) <= budget or len(batch) == 1
    assert plan == plan_batches(tokens, budget, world)


def test_plans_balance_what_ranks_run_at_the_same_time():
    # 16 groups of 100 and 300 tokens, 2 ranks, batches of 1,000: 3,200 tokens need 4, of 800 each
    plan = plan_batches([100, 300] * 8, 1000, 2)
    loads = [[sum([100, 300][i % 2] for i in batch) for batch in batches] for batches in plan]
    assert loads == [[800, 800], [800, 800]]


def test_steps_are_the_same_groups_for_any_ranks_and_budget():
    tokens = [10 + 7 * i % 50 for i in range(23)]

    def groups(world, budget):
        ranks = [
            list(plan_steps(tokens, 5, budget, seed=3, total=10, rank=r, world=world))
            for r in range(world)
        ]
        dealt = [
            sorted(i for rank in ranks for batch in rank[s].batches for i in batch)
            for s in range(10)
        ]
        assert dealt == [sorted(ranks[0][s].groups) for s in range(10)]
        return [step.groups for step in ranks[0]]

    expected = groups(1, 10_000)
    assert groups(2, 60) == groups(4, 1) == groups(3, 200) == expected
    # two epochs of 5 steps, the last of 3 groups; each group once an epoch; another order in the
    # second
    first, second = sum(expected[:5], ()), sum(expected[5:], ())
    assert [len(g) for g in expected] == [5, 5, 5, 5, 3] * 2
    assert sorted(first) == sorted(second) == list(range(23)) and first != second


def test_steps_continue_anywhere():
    tokens = [10] * 23
    whole = list(plan_steps(tokens, 5, 40, seed=3, total=12))
    assert list(plan_steps(tokens, 5, 40, seed=3, total=12, start=7)) == whole[7:]


def test_order_is_pinned():
    # numpy's Philox is specified; a change here would change every run's order
    assert shuffled(6, 0, 0).tolist() != shuffled(6, 1, 0).tolist()
    assert shuffled(8, 0, 0).tolist() == [5, 0, 6, 1, 7, 2, 4, 3]


@pytest.mark.parametrize(
    "count, batch, epochs, most, expected",
    [
        (10, 4, 1, 0, 3),
        (10, 4, 2, 0, 6),
        (10, 4, 2, 5, 5),
        (8, 4, 0.5, 0, 1),
        (8, 4, 1.25, 0, 3),
        (3, 16, 1, 0, 1),
    ],
)
def test_num_steps(count, batch, epochs, most, expected):
    assert num_steps(count, batch, epochs, most) == expected


def test_passes_plan_batches_whatever_the_ranks():
    tokens = [30, 10, 20, 40, 50, 10, 20]
    alone = plan_pass(tokens, 60)
    for world in (2, 3, 4):
        dealt = [plan_pass(tokens, 60, rank=r, world=world) for r in range(world)]
        assert len({len(batches) for batches in dealt}) == 1
        together = [batch for batches in zip(*dealt, strict=True) for batch in batches]
        assert [batch for batch in together if batch] == [batch for batch in alone if batch]


def test_sequences_are_views_of_the_prompt_and_one_response():
    batch = pack([Group((1, 2), ((3,), (4, 5), (6,)))])
    assert [ids.tolist() for ids, _ in batch.sequences()] == [[1, 2, 3], [1, 2, 4, 5], [1, 2, 6]]
    assert torch.equal(batch.lengths, torch.tensor([1, 2, 1]))


def plain_pack(groups):
    """The layout once more, token by token in lists."""
    ids, positions, kv_index, cu_q, cu_k = [], [], [], [0], [0]
    hidden_index, target, lengths, digests = [], [], [], []
    for group in groups:
        prompt = len(group.prompt)
        start = len(ids)
        ids += group.prompt
        positions += range(prompt)
        for response in group.responses:
            offset = len(ids)
            ids += response
            positions += range(prompt, prompt + len(response))
            kv_index += [*range(start, start + prompt), *range(offset, len(ids))]
            cu_q.append(len(ids))
            cu_k.append(len(kv_index))
            first = 0 if prompt else 1
            hidden_index += [start + prompt - 1, *range(offset, len(ids) - 1)][first:]
            target += response[first:]
            lengths.append(len(response) - first)
            digests.append(digest(group.prompt, response))
    users = [[] for _ in ids]
    for key, token in enumerate(kv_index):
        users[token].append(key)
    k_max = max(map(len, users))
    int64 = {
        "input_ids": ids,
        "positions": positions,
        "kv_index": kv_index,
        "kv_users": [keys + [len(kv_index)] * (k_max - len(keys)) for keys in users],
        "hidden_index": hidden_index,
        "target": target,
        "lengths": lengths,
    }
    labels = [group.label for group in groups]
    targets = [group.target for group in groups]
    return PackedBatch(
        **{name: torch.tensor(values, dtype=torch.int64) for name, values in int64.items()},
        cu_q=torch.tensor(cu_q, dtype=torch.int32),
        cu_k=torch.tensor(cu_k, dtype=torch.int32),
        labels=None if labels[0] is None else torch.tensor(labels, dtype=torch.bool),
        targets=None if targets[0] is None else torch.tensor(targets, dtype=torch.float64),
        digests=tuple(digests),
        group_rows=tuple(group.row for group in groups),
        shape=tuple((len(group.prompt), *map(len, group.responses)) for group in groups),
        memory=None,
    )


RESPONSES = st.lists(
    st.lists(st.integers(0, 50_000), min_size=1, max_size=9), min_size=1, max_size=4
)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.lists(st.integers(0, 50_000), max_size=9), RESPONSES), min_size=1),
    st.booleans(),
)
def test_packing_is_the_plain_layout(parts, judged):
    groups = [
        Group(
            tuple(prompt),
            tuple(map(tuple, responses)),
            row=i,
            label=i % 3 == 0 if judged else None,
            target=i / 3 if judged else None,
        )
        for i, (prompt, responses) in enumerate(parts)
    ]
    for name, found, expected in zip(
        PackedBatch._fields, pack(groups), plain_pack(groups), strict=True
    ):
        if name == "memory":
            continue
        if torch.is_tensor(expected):
            assert found.dtype == expected.dtype and torch.equal(found, expected), name
        else:
            assert found == expected, name


def test_a_batch_moves_in_one_copy():
    group = Group((7, 8), ((1, 2, 3), (4,)), row=1, label=True, target=0.5)
    for batch in (pack([group]), pack([])):
        moved = batch.to("meta")
        memory = batch.memory.untyped_storage()._cdata
        there = moved.memory.untyped_storage()._cdata
        assert memory != there
        for x, view in zip(batch, moved, strict=True):
            if torch.is_tensor(x):
                assert x.untyped_storage()._cdata == memory and x.is_contiguous()
                assert view.untyped_storage()._cdata == there and view.device.type == "meta"
                # at its own place: a copy of the memory has the same values there
                place = batch.memory.clone().view(x.dtype)
                place = place.as_strided(view.shape, view.stride(), view.storage_offset())
                assert torch.equal(place, x)
    # a field that was put in later moves on its own
    other = batch._replace(lengths=torch.tensor([3])).to("meta")
    assert other.lengths.shape == (1,) and other.lengths.device.type == "meta"
    assert other.input_ids.device.type == "meta"
