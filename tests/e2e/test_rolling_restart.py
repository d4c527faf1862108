"""Replicas that are restarted under load lose no request; `make soak-restart` does the same for all, for longer."""

import pytest
from load.rolling_restart import restart_in_turn

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


async def test_no_request_fails_while_a_tokenizer_and_a_worker_are_restarted() -> None:
    load = await restart_in_turn(replicas=("tokenizer", "inference"), rest_s=0.5, callers=4)

    assert [(phase.name, dict(phase.errors), phase.wrong) for phase in load.phases] == [
        ("nothing", {}, 0),
        ("restart tokenizer", {}, 0),
        ("restart inference", {}, 0),
    ]
    assert all(phase.answers for phase in load.phases)
