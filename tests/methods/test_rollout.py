"""Which groups make a minibatch, and in which order minibatches are trained on."""

import pytest

from train.methods.rollout import minibatches, order_of_updates


def test_a_rollout_s_minibatches():
    """Whole groups, each in one of them, about as many in each; drawn anew for every rollout."""
    drawn = [minibatches([10] * 11, 4, 25, seed=3, number=number) for number in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    for parts in drawn:
        assert sorted(i for part in parts for i in part.groups) == [*range(11)]
        assert [len(part.groups) for part in parts] == [2, 3, 3, 3]
        for part in parts:
            assert sorted(i for batch in part.batches for i in batch) == sorted(part.groups)
            assert max(map(len, part.batches)) <= 2  # 25 tokens hold two groups
    assert len(minibatches([10] * 3, 4, 25, seed=3, number=0)) == 3


def test_groups_without_a_gradient_are_of_a_minibatch_but_in_no_batch():
    with_all = minibatches([10] * 8, 2, 25, seed=3, number=0)
    without = minibatches([10] * 8, 2, 25, seed=3, number=0, idle=[1, 5])
    assert [part.groups for part in without] == [part.groups for part in with_all]
    trained = {i for part in without for batch in part.batches for i in batch}
    assert trained == {0, 2, 3, 4, 6, 7}


@pytest.mark.parametrize("epochs", [1, 4])
def test_every_epoch_trains_on_every_minibatch_in_an_order_of_its_own(epochs):
    order = order_of_updates(6, epochs, seed=3, number=7)
    passes = [tuple(order[6 * e : 6 * e + 6]) for e in range(epochs)]
    assert all(sorted(each) == [*range(6)] for each in passes) and len(set(passes)) == epochs
    assert order_of_updates(6, epochs, seed=3, number=8) != order
