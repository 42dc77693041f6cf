"""The cached reference against the live one: equal, complete, noticed when damaged, and found by
content only.
"""

import os
import threading
import time

import numpy as np
import pytest
import tiny
import torch

from tests.engine.made_pairs import made_pairs
from train.data.packing import digest, pack
from train.data.steps import plan_pass
from train.methods import reference, reference_cache
from train.models.backbone import Backbone


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ZEROPREF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache/reference"


def live(seed=0, autocast=None, **options):
    return reference.Live(
        Backbone(tiny.make_model("llama", seed=seed), autocast=autocast, **options), {}
    )


class Counted:
    """A live reference that counts its rows."""

    def __init__(self, inner):
        self.inner, self.module, self.device, self.rows = inner, inner.module, inner.device, 0

    def __call__(self, row):
        self.rows += 1
        return self.inner(row)


def cached(inner, data, budget=4000, said=None):
    return reference.Cached(
        inner, [data], budget, "fp32", say=(said if said is not None else []).append
    )


def rows_of(data, budget=120):
    return [
        pack([data.group(i) for i in groups]) for groups in plan_pass(data.lengths.sum(1), budget)
    ]


def test_larger_rows_are_within_1e_5_nats_and_the_same_rows_equal(cache):
    data, inner = made_pairs(), live()
    found = cached(inner, data)
    for row in rows_of(data):
        assert torch.allclose(found(row), inner(row), rtol=0, atol=1e-5)
    plan = plan_pass(data.lengths.sum(1), 4000)
    for groups in plan:
        row = pack([data.group(i) for i in groups])
        assert torch.equal(found(row), inner(row))
    assert found(pack([])).shape == (0,)


def test_made_once_and_shared(cache):
    data, counted, said = made_pairs(), Counted(live()), []
    cached(counted, data, said=said)
    made = counted.rows - reference.SPOT_CHECKS
    assert (
        made == len(plan_pass(data.lengths.sum(1), 4000))
        and "11 groups of them made now" in said[0]
    )
    again = Counted(live())
    cached(again, data, said=said)
    assert again.rows == reference.SPOT_CHECKS and "0 groups of them made now" in said[1]
    more = made_pairs(13)  # the first eleven are the same
    third = Counted(live())
    cached(third, more, said=said)
    assert "2 groups of them made now" in said[2] and len(list(cache.glob("*/*.safetensors"))) == 2


def test_another_model_type_or_layout_is_another_shelf(cache):
    data = made_pairs(3)
    for inner in (live(), live(seed=1), live(autocast=torch.bfloat16), live(layout="padded")):
        reference.Cached(inner, [data], 4000, "bf16", say=lambda line: None)
    assert len(list(cache.iterdir())) == 4
    inner = live()
    with torch.no_grad():
        next(inner.module.parameters()).view(-1)[7] += 1e-6
    cached(inner, data)
    assert len(list(cache.iterdir())) == 5


def test_another_configuration_of_the_same_weights_is_another_shelf():
    names = set()
    for change in ({}, {"sliding_window": 4}, {"rope_theta": 5e5}):
        module = Backbone(tiny.make_model("mistral", **change))
        names.add(reference._identity(reference.Live(module, {})))
    assert len(names) == 3


def test_one_other_token_has_no_record():
    data = made_pairs()
    found = cached(live(), data)
    group = data.group(4)
    response = list(group.responses[1])
    response[0] += 1
    with pytest.raises(ValueError, match="row 4: the cached reference has no record"):
        found(
            pack([data.group(0), group._replace(responses=(group.responses[0], tuple(response)))])
        )
    with pytest.raises(ValueError, match="row 4"):
        found(pack([group._replace(prompt=(*group.prompt, 5))]))


@pytest.mark.parametrize("damage", ["truncated", "flipped", "emptied"])
def test_a_damaged_file_is_noticed_and_made_again(cache, damage, caplog):
    data, inner = made_pairs(), live()
    expected = cached(inner, data).values.clone()
    (path,) = cache.glob("*/*.safetensors")
    content = bytearray(path.read_bytes())
    content[-3] ^= 64
    path.write_bytes({"truncated": content[:-40], "flipped": content, "emptied": b""}[damage])
    said = []
    again = cached(inner, data, said=said)
    assert torch.equal(again.values, expected) and "11 groups of them made now" in said[0]
    assert not path.exists()


def test_records_that_are_not_the_models_are_refused(cache):
    data, inner = made_pairs(), live()
    place = reference_cache.directory(reference._identity(inner))
    wrong = {}
    for i in range(len(data)):
        group = data.group(i)
        wrong |= {
            digest(group.prompt, r): np.full(len(r), -1.0, np.float32) for r in group.responses
        }
    reference_cache.write_records(place, wrong)
    with pytest.raises(
        ValueError, match=r"row \d+: the cached reference is off by .* nats a token"
    ):
        cached(inner, data)


def test_two_jobs_write_at_once(cache):
    records = [
        {digest((job,), (i,)): np.full(3, i, np.float32) for i in range(200)} for job in range(4)
    ]
    threads = [
        threading.Thread(target=reference_cache.write_records, args=(cache / "x", each))
        for each in records
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        reference_cache.read_records(
            cache / "x", set()
        )  # whoever reads meanwhile finds whole files only
    found = reference_cache.read_records(cache / "x", {name for each in records for name in each})
    assert len(found) == 800 and len(list((cache / "x").glob("*.safetensors"))) == 12
    assert all(
        found[name].tolist() == values.tolist() for each in records for name, values in each.items()
    )


def test_old_shelves_go_when_the_bound_is_reached(cache):
    for number, name in enumerate("abc"):
        reference_cache.write_records(
            cache / name, {digest((), (number,)): np.zeros(1000, np.float32)}
        )
        past = time.time() - 10000 + number
        os.utime(cache / name, (past, past))
    one = reference_cache.size(cache / "a")
    reference_cache.evict(cache / "a", most=2 * one + 10)
    assert sorted(p.name for p in cache.iterdir()) == [
        "a",
        "c",
    ]  # b was used least recently, a is in use
    os.utime(cache / "c")
    reference_cache.evict(cache / "a", most=1)
    assert sorted(p.name for p in cache.iterdir()) == [
        "a",
        "c",
    ]  # somebody may be using c right now


def test_a_reference_that_moves(tmp_path):
    """TR-DPO's updates in fp32, whatever type the weights are held in, and back from a checkpoint."""

    class Policy:
        stage = 0

    policy = Policy()
    policy.module = Backbone(tiny.make_model("llama", seed=5))
    for dtype in (torch.float32, torch.bfloat16):
        moving = reference.Live(Backbone(tiny.make_model("llama", dtype=dtype)), {}, moves=True)
        expected = [p.detach().double() for p in moving.module.parameters()]
        for share in (0.3, 1e-4, 1e-4):
            moving.follow(policy, share)
            expected = [
                (1 - share) * old + share * new.detach().double()
                for old, new in zip(expected, policy.module.parameters(), strict=True)
            ]
        for mine, p, true in zip(
            moving.tensors(), moving.module.parameters(), expected, strict=True
        ):
            assert (mine - true).abs().max() < 1e-6 and torch.equal(p, mine.to(dtype))
        keys = moving.shapes()
        kept = {key: w.clone() for key, w in zip(keys, moving.tensors(), strict=True)}
        assert {key: tuple(w.shape) for key, w in kept.items()} == keys
        again = reference.Live(Backbone(tiny.make_model("llama", dtype=dtype)), {}, moves=True)
        again.load_tensors(kept.__getitem__, {})
        for one, other in zip(again.module.parameters(), moving.module.parameters(), strict=True):
            assert torch.equal(one, other)
        moving.follow(policy, 1.0)
        assert all(
            torch.equal(a, b)
            for a, b in zip(moving.tensors(), policy.module.parameters(), strict=True)
        )
