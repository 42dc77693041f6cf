"""Our losses against TRL's own code for them; the table is that of
tests/benchmarks/peers_losses.py.
"""

import pytest

pytestmark = pytest.mark.slow


def test_every_loss_is_trls_or_says_why_not():
    pytest.importorskip("trl")
    from tests.benchmarks import peers_losses as peers

    found = [peers.compare(*row) for row in peers.rows()]
    names = {name for one in found for name in one.case.theirs.get("loss_type", [one.case.loss])}
    assert names == {*peers.PLAIN, "sft", "kto", "simpo", "cpo", "orpo"}
    wrong = [one for one in found if not one.as_said]
    assert not wrong, "\n".join(map(str, wrong))
