"""Placement: which pools serve a model. One that is placed on none in particular is served by all."""

import json
from collections.abc import Iterable

from sqlalchemy import select
from sqlalchemy.orm import Session

from modelfleet.manager.aliases import next_revision
from modelfleet.manager.rollout_states import UNDECIDED
from modelfleet.manager.store.tables import ModelRow, RolloutRow
from modelfleet.manager.workers import LONGEST_NAME
from modelfleet.runtime.errors import InvalidInputError, StateConflictError

_MOST_POOLS = 100


def check_pools(pools: Iterable[str]) -> tuple[str, ...]:
    """Return the names of pools, each once and in order. Raises InvalidInputError for what can be none."""
    names = sorted(set(pools))
    if len(names) > _MOST_POOLS:
        raise InvalidInputError(
            f"pools has {len(names)} names. Give at most {_MOST_POOLS}, or none for every pool.", field="pools"
        )
    for name in names:
        if not 0 < len(name) <= LONGEST_NAME:
            raise InvalidInputError(
                f"pools has {name[:LONGEST_NAME]!r}. Give names of 1 to {LONGEST_NAME} characters.", field="pools"
            )
    return tuple(names)


def pools_of(row: ModelRow) -> tuple[str, ...]:
    """Return the names of the pools that serve a model, in order; empty for all."""
    return tuple(json.loads(row.pools_json))


def serves(pool: str, pools: tuple[str, ...]) -> bool:
    """Return whether a pool serves a model that is placed on `pools`."""
    return not pools or pool in pools


def place(session: Session, row: ModelRow, pools: tuple[str, ...]) -> bool:
    """
    Place a model, and return whether it was placed otherwise before.

    Raises StateConflictError while a rollout of the model is undecided: it asks the workers of these pools.
    """
    if pools_of(row) == pools:
        return False
    query = select(RolloutRow.rollout).filter_by(model=row.model).where(RolloutRow.state.in_(UNDECIDED))
    if (rollout := session.scalar(query)) is not None:
        raise StateConflictError(
            f"The model {row.model!r} is under rollout {rollout} and cannot be placed. "
            "Abort that, or wait until it is over."
        )
    row.pools_json = json.dumps(pools)
    next_revision(session)
    return True
