"""Batches in the shapes of buckets: shapes by hand, and the same numbers as batches as they came."""

import contextlib

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from wide import Wide

from tests.models.test_backbone import groups, one_by_one, relative, value_and_gradients
from tests.models.test_heads import one_by_one as scores_one_by_one
from train.data.packing import Group, pack
from train.losses import composition
from train.methods import preference
from train.models import attention, buckets
from train.models.backbone import Backbone
from train.models.heads import ScoreModel


def test_a_row_by_hand(monkeypatch):
    monkeypatch.setattr(buckets, "STRIDE", 8)
    monkeypatch.setattr(buckets, "LEAST_SEGMENTS", 4)
    # P = 7 8, A = 1 2 3, B = 4: 6 tokens, 8 keys; with 2 of junk 8 and 10
    batch = pack([Group((7, 8), ((1, 2, 3), (4,)))])
    bucket = {"tokens": 8, "keys": 16, "segments": 4, "users": 2, "longest": 8}
    assert buckets.bucket_of(batch) == bucket
    segments = buckets.static_segments(batch, has_flash=False)
    row = segments.batch
    assert row.input_ids.tolist() == [7, 8, 1, 2, 3, 4, 7, 7]
    assert row.positions.tolist() == [0, 1, 2, 3, 4, 2, 0, 0]
    assert row.cu_q.tolist() == [0, 5, 6, 8, 8]  # [P A] [B] [junk] []
    assert row.cu_k.tolist() == [0, 5, 8, 10, 10]
    assert row.kv_index.tolist()[:10] == [0, 1, 2, 3, 4, 0, 1, 5, 6, 7]
    assert row.kv_index.shape == (16,)
    assert row.kv_users.tolist() == [
        [0, 5],
        [1, 6],
        [2, 16],
        [3, 16],
        [4, 16],
        [7, 16],
        [8, 16],
        [9, 16],
    ]
    assert row.cu_q.dtype == row.cu_k.dtype == torch.int32
    assert segments.max_queries == segments.max_keys == 8
    seen = segments.visible(0).int()
    assert seen[1].tolist() == [1, 1, 0, 0, 0, 0, 0, 0]  # of P itself
    assert seen[4].tolist() == [1, 1, 1, 1, 1, 0, 0, 0]  # of A: P and A
    assert seen[5].tolist() == [1, 1, 0, 0, 0, 1, 0, 0]  # of B: P and B
    assert seen[7].tolist() == [0, 0, 0, 0, 0, 0, 1, 1]  # of the junk
    assert segments.visible(2).int()[4].tolist() == [0, 0, 0, 1, 1, 0, 0, 0]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 300), st.lists(st.integers(1, 300), min_size=1, max_size=5)),
        max_size=6,
    )
)
def test_shapes_depend_on_the_bucket_alone(sizes):
    batch = pack([Group((5,) * p, tuple((6,) * n for n in r)) for p, r in sizes])
    bucket = buckets.bucket_of(batch)
    row = buckets.static_segments(batch, has_flash=True).batch
    assert bucket["tokens"] % 512 == 0 and bucket["tokens"] - len(batch.input_ids) < 512
    assert row.input_ids.shape == row.positions.shape == (bucket["tokens"],)
    assert row.kv_index.shape == (bucket["keys"],)
    assert row.kv_users.shape == (bucket["tokens"], bucket["users"])
    assert row.cu_q.shape == row.cu_k.shape == (bucket["segments"] + 1,)
    # what varlen kernels ask for: every query in a segment, segments in order, none too long
    assert row.cu_q[0] == 0 and row.cu_q[-1] == bucket["tokens"]
    for ends in (row.cu_q, row.cu_k):
        assert (ends.diff() >= 0).all() and ends.diff().max() <= bucket["longest"]
    assert row.cu_k[-1] <= bucket["keys"]
    assert ((row.cu_k.diff() > 0) == (row.cu_q.diff() > 0)).all()
    # each key that is in a segment is noted once with its token, and no other is
    used = row.kv_users[row.kv_users < bucket["keys"]]
    assert used.sort().values.tolist() == list(range(int(row.cu_k[-1])))
    for j in range(bucket["users"]):
        users = row.kv_users[:, j]
        there = users < bucket["keys"]
        assert torch.equal(row.kv_index[users[there]], there.nonzero()[:, 0])


def static(model):
    model.static_shapes = True
    return model


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_filled_batch_equals_the_batch_and_one_by_one(family, dtype):
    """Value and gradient, against the batch as it came and the fp64 oracle."""
    batch = pack(groups())
    oracle = tiny.make_model(family, dtype=torch.float64)
    plain = Backbone(tiny.make_model(family, dtype=dtype))
    filled = static(Backbone(tiny.make_model(family, dtype=dtype)))
    near = 1e-9 if dtype == torch.float64 else 1e-5
    with Wide():
        exact, exact_gradients = value_and_gradients(oracle, one_by_one(oracle, batch))
    with Wide() if dtype == torch.float64 else contextlib.nullcontext():
        expected, expected_gradients = value_and_gradients(plain.lm, plain(batch))
        found, gradients = value_and_gradients(filled.lm, filled(batch))
    assert found.shape == expected.shape
    for other, others in ((expected, expected_gradients), (exact, exact_gradients)):
        assert ((found.double() - other.double()).abs() / other.abs().double()).max() < near
        for name, gradient in gradients.items():
            assert relative(gradient, others[name].double()) < near, name


@pytest.mark.parametrize("at", ["last", "before"])
def test_scores_of_a_filled_batch_equal_one_by_one(at):
    batch = pack(groups())
    oracle = tiny.make_score_model("llama", torch.float64, pad_token_id=None)
    filled = static(ScoreModel(tiny.make_score_model("llama", torch.float64)))
    with Wide():
        expected, gradients = value_and_gradients(oracle, scores_one_by_one(oracle, batch, at))
        found, found_gradients = value_and_gradients(filled.lm, filled(batch, at=at))
    assert found.shape == expected.shape and (found - expected).abs().max() < 1e-9
    for name, gradient in gradients.items():
        assert relative(found_gradients[name], gradient) < 1e-9, name


def varlen(query, key, value, row, window):
    """What a varlen kernel computes, segment by segment from the offsets: (L, H, D), (K, H, D) x 2."""
    out = torch.zeros_like(query)
    for s in range(len(row.cu_q) - 1):
        q = query[row.cu_q[s] : row.cu_q[s + 1]].transpose(0, 1)  # (H, q, D)
        k = key[row.cu_k[s] : row.cu_k[s + 1]].transpose(0, 1)
        v = value[row.cu_k[s] : row.cu_k[s + 1]].transpose(0, 1)
        place = torch.arange(k.shape[1])
        distance = place[k.shape[1] - q.shape[1] :, None] - place
        hidden = (distance < 0) | (distance >= window if window else False)
        scores = (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).masked_fill(hidden, -torch.inf)
        out[row.cu_q[s] : row.cu_q[s + 1]] = (scores.softmax(-1) @ v).transpose(0, 1)
    return out


@pytest.mark.parametrize("window", [0, 6])
def test_a_row_for_varlen_kernels_is_the_batch(window):
    """Attention by the offsets of the row, its gradient through GatherKeys, and of keys in no segment
    what such a kernel leaves there: anything.
    """
    batch = pack(groups())
    segments = buckets.static_segments(batch, has_flash=True)
    row, tokens = segments.batch, len(batch.input_ids)
    random = torch.Generator().manual_seed(0)
    full = [
        torch.randn(len(row.input_ids), 2, 8, dtype=torch.float64, generator=random)
        for _ in range(3)
    ]
    weights = torch.randn(tokens, 2, 8, dtype=torch.float64, generator=random)

    def attend(of, length):
        query, key, value = (x[:length].clone().requires_grad_() for x in full)
        gathered = [attention.GatherKeys.apply(x, of.kv_index, of.kv_users) for x in (key, value)]

        def spoil(grad):
            return torch.cat([grad[: of.cu_k[-1]], grad[of.cu_k[-1] :] * torch.nan])

        for x in gathered:
            x.register_hook(spoil)
        out = varlen(query, *gathered, of, window)[:tokens]
        return out, torch.autograd.grad((out * weights).sum(), (query, key, value))

    expected, expected_gradients = attend(batch, tokens)
    found, gradients = attend(row, len(row.input_ids))
    assert torch.equal(found, expected)
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        assert torch.allclose(gradient[:tokens], wanted, rtol=1e-12, atol=1e-14)
        assert not gradient[tokens:].any()


@pytest.mark.parametrize(
    "spec, args", [("sigmoid", {}), ("sigmoid", {"ld_alpha": 0.5}), ("sft", {})]
)
def test_junk_does_not_reach_the_loss(spec, args):
    """Losses, weights by lengths, and the gradient, of pairs; the batch itself stays as it was."""
    pairs = [g for g in groups() if len(g.responses) == 2]
    batch = pack(pairs)
    before = [x.clone() if torch.is_tensor(x) else x for x in batch]
    loss = composition.choose(spec, 0.1, args)
    found = []
    for is_static in (False, True):
        model = Backbone(tiny.make_model("llama", dtype=torch.float64))
        model.static_shapes = is_static
        with Wide():
            logps = model(batch)
            scored = preference.score_batch(logps, torch.zeros_like(logps), batch, loss)
            losses = loss(scored.examples, scored.weights)
            losses.sum().backward()
        gradients = {name: p.grad for name, p in model.named_parameters()}
        found.append((losses.detach(), scored.examples, gradients))
    (losses, examples, gradients), (others, other_examples, other_gradients) = found
    assert losses.shape == others.shape == (len(pairs),)
    assert torch.allclose(losses, others, rtol=1e-11)
    for x, y in zip(examples, other_examples, strict=True):
        assert torch.allclose(x, y, rtol=1e-11)
    for name, gradient in gradients.items():
        assert relative(other_gradients[name], gradient) < 1e-9, name
    for x, y in zip(before, batch, strict=True):
        assert torch.equal(x, y) if torch.is_tensor(x) else x == y


def test_an_empty_batch_in_its_bucket_has_zero_gradients():
    backbone = static(Backbone(tiny.make_model("llama")))
    logps, gradients = value_and_gradients(backbone.lm, backbone(pack([])))
    assert logps.shape == (0,) and not any(g.any() for g in gradients.values())


@pytest.mark.parametrize("static_shapes", [False, True])
@pytest.mark.parametrize("asked", [False, True])
def test_layers_are_told_whether_gradients_repeat(static_shapes, asked):
    """--deterministic, with the batch as it came and in its bucket."""
    model = Backbone(tiny.make_model())
    model.deterministic, model.static_shapes = asked, static_shapes
    told = []
    model.lm.model.layers[0].register_forward_pre_hook(
        lambda layer, args, kwargs: told.append(kwargs["segments"].deterministic), with_kwargs=True
    )
    model(pack(groups()))
    assert told == [asked]
