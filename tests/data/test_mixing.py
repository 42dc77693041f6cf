"""Which rows of which source an epoch takes; counts by hand."""

import json
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

from train.data import dataset, mixing, prompts, tokens
from train.data.mixing import Mix, Part, shuffled
from train.data.steps import num_drawn, num_steps, plan_rollouts, plan_steps

PINNED = [[9, 3, 10, 2, 11, 1, 8, 7], [5, 4, 8, 0, 11, 9, 6, 10]]  # of seed 0, epochs 0 and 1
LENGTHS = {"max_length": 64, "max_prompt_length": 32}


def part(share, groups, name="a"):
    return Part(name, f"{name}.jsonl", Fraction(share), np.asarray(groups))


def rows(path, count, word, first=0):
    lines = [
        {"prompt": f"{word} {i}", "chosen": "a yes", "rejected": "no"}
        for i in range(first, first + count)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


@pytest.mark.parametrize(
    "share, rows, expected",
    [
        ("0.3", 10, 3),
        ("0.35", 10, 4),  # 3.5: a half goes up
        ("0.25", 10, 3),  # 2.5
        ("0.24", 10, 2),
        ("0.145", 100, 15),  # 14.5, which is 14.499999999999998 in binary
        ("0.001", 10, 1),  # one at least
        ("1", 10, 10),
        ("0.999", 10, 10),
        ("0.3", 0, 0),  # all its rows were held out
    ],
)
def test_counts_by_hand(share, rows, expected):
    assert part(share, range(rows)).count == expected


def test_no_row_twice_in_an_epoch_and_all_within_a_cycle():
    """Two of five rows: a cycle is three epochs, and its last one takes one row of the first again."""
    own = part("0.4", [10, 11, 12, 13, 14])
    seen = []
    for cycle in range(4):
        epochs = [own.drawn(0, 7, 3 * cycle + i).tolist() for i in range(3)]
        assert all(len({*epoch}) == 2 for epoch in epochs)
        in_order = sum(epochs, [])
        assert sorted(in_order[:5]) == [10, 11, 12, 13, 14] and in_order[5] == in_order[0]
        seen.append(tuple(in_order))
    assert len({*seen}) == 4  # each cycle is shuffled anew
    assert own.drawn(1, 7, 0).tolist() != own.drawn(0, 7, 0).tolist()  # another source
    assert own.drawn(0, 8, 0).tolist() != own.drawn(0, 7, 0).tolist()  # another seed


def test_draws_are_pinned():
    # a change here would change what every mixed run is trained on
    mix = Mix((part("0.5", range(8)), part("1", range(8, 12), "b")))
    assert mix.order(0, 0).tolist() == PINNED[0] and mix.order(0, 1).tolist() == PINNED[1]
    # four of the eight each, then the other four; b whole in both
    first, second = ({*order} for order in PINNED)
    assert first & second == {8, 9, 10, 11} and first | second == {*range(12)}


def test_what_is_taken_whole_has_the_order_without_shares():
    mix = Mix((part("1", range(5)), part("0.99", range(5, 23), "b")))
    assert mix.is_whole and mix.draws() is None
    assert mix.order(3, 2).tolist() == shuffled(23, 3, 2).tolist()
    lengths = [10 + 7 * i % 50 for i in range(23)]
    plans = [list(plan_steps(lengths, 5, 40, seed=3, total=12, mix=m)) for m in (None, mix)]
    assert plans[0] == plans[1]


def test_steps_of_a_mix():
    """3 of 10 rows and all of 4 are 7 an epoch: steps of 3, 3 and 1."""
    mix = Mix((part("0.3", range(10)), part("1", range(10, 14), "b")))
    assert mix.count == 7 and mix.draws() == [[3, 10], [4, 4]]
    total = num_steps(mix.count, 3, 4)
    assert total == 12
    lengths = [10] * 14
    whole = list(plan_steps(lengths, 3, 40, seed=5, total=total, mix=mix))
    assert [len(step.groups) for step in whole] == [3, 3, 1] * 4
    epochs = [sum((s.groups for s in whole if s.epoch == e), ()) for e in range(4)]
    for epoch in epochs:
        assert len({*epoch}) == 7 and {*range(10, 14)} <= {*epoch}
    # four epochs of three take all ten rows, two of them twice
    times = Counter(i for epoch in epochs for i in epoch if i < 10)
    assert sorted(times.values()) == [1] * 8 + [2] * 2
    # anywhere in an epoch, and on any ranks
    assert list(plan_steps(lengths, 3, 40, seed=5, total=total, start=7, mix=mix)) == whole[7:]
    of_ranks = [plan_steps(lengths, 3, 9, seed=5, total=total, rank=r, world=2, mix=mix) for r in (0, 1)]  # fmt: skip
    for alone, *ranks in zip(whole, *of_ranks, strict=True):
        dealt = [i for rank in ranks for batch in rank.batches for i in batch]
        assert sorted(dealt) == sorted(alone.groups) and ranks[0].groups == alone.groups
    rollouts = list(plan_rollouts(mix, 3, seed=5, total=total, start=2))
    assert [r.groups for r in rollouts] == [step.groups for step in whole[2:]]
    assert [num_drawn(n, 7, 3) for n in range(5)] == [0, 3, 6, 7, 10]


def test_names_are_short_and_each_its_own():
    found = mixing.short_names(
        [
            "/d/pairs.jsonl",
            "/e/pairs.jsonl.gz",
            "org/pairs:config@train[:10%]",
            "/runs/saved@test",
            "/d/v1.2.parquet",
            "/d/a b:c.json",
            "/d/pairs-2.csv",
            "/d/pairs.d/",
        ]
    )
    assert found == [
        *("pairs", "pairs-2", "pairs-3", "saved", "v1.2", "a_b_c", "pairs-2-2", "pairs.d"),
    ]


def test_a_data_set_knows_its_mix(tmp_path, merged):
    """Sources of 6, 0 sound, 4 and again the first 6 rows: of 16, 3 + 4 + 2 an epoch."""
    one, two = rows(tmp_path / "one.jsonl", 6, "one"), rows(tmp_path / "two.jsonl", 4, "two")
    (tmp_path / "odd.jsonl").write_text('{"prompt": "", "chosen": "a", "rejected": "b"}\n' * 2)
    named = [one, str(tmp_path / "odd.jsonl"), two, one]
    shares = [Fraction(1, 2), Fraction(1, 5), Fraction(1), Fraction(1, 3)]
    data = tokens.collect(named, merged, **LENGTHS, shares=shares)
    mix = mixing.mix_of(data)
    assert mix.draws() == [[3, 6], [4, 4], [2, 6]] and len(data.dropped) == 2
    assert [p.groups.tolist() for p in mix.parts] == [[*range(6)], [*range(6, 10)], [*range(10, 16)]]  # fmt: skip
    assert mix.lines() == [
        "one: 3 of 6 rows an epoch (share 0.5)",
        "two: 4 of 4 rows an epoch",
        "one-2: 2 of 6 rows an epoch (share 0.333333)",
    ]
    assert mix.described()["one-2"] == {
        "source": one,
        "share": pytest.approx(1 / 3),
        "groups": 6,
        "groups_an_epoch": 2,
    }
    # the tokens are the same whatever the shares, and so is what is held out
    plain = tokens.collect(named, merged, **LENGTHS)
    assert plain.fingerprint == data.fingerprint and mixing.mix_of(plain).is_whole
    train, held_out = dataset.split_by_prompt(data, 0.4, 1)
    assert held_out.rows.tolist() == dataset.split_by_prompt(plain, 0.4, 1)[1].rows.tolist()
    counts = mixing.by_source(held_out)
    left = [6, 4, 6]
    assert {*counts} == {"one", "two", "one-2"} and 0 < len(held_out) < 16
    for i, (p, own) in enumerate(zip(mixing.mix_of(train).parts, counts.values(), strict=True)):
        assert len(p.groups) == left[i] - own["groups"]
        assert {*train.rows[p.groups].tolist()} <= {*data.rows[mix.parts[i].groups].tolist()}
    assert mixing.mix_of(tokens.collect([one], merged, **LENGTHS)).lines() == []


def test_rows_find_their_source(tmp_path, merged):
    one, two = rows(tmp_path / "one.jsonl", 3, "one"), rows(tmp_path / "two.jsonl", 2, "two")
    data = tokens.collect([one, two], merged, **LENGTHS)
    sources = mixing.sources_of(data)
    assert sources.several == ("one", "two")
    assert [places.tolist() for places in sources.split([4, 0, 2, 3])] == [[1, 2], [0, 3]]
    assert [len(places) for places in sources.split([])] == [0, 0]
    alone = mixing.sources_of(tokens.collect([one], merged, **LENGTHS))
    assert alone.several == () and alone.split([0, 1]) == []


def test_prompts_that_stand_in_two_sources_count_for_the_first(tmp_path, merged):
    one, two = rows(tmp_path / "one.jsonl", 4, "one"), rows(tmp_path / "two.jsonl", 4, "one", first=2)  # fmt: skip
    found = prompts.prepare([one, two], merged, **LENGTHS, shares=[Fraction(1, 2), Fraction(1, 2)])
    assert mixing.mix_of(found.data).draws() == [[2, 4], [1, 2]]
