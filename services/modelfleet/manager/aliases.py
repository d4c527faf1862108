"""Where aliases point, and the revision of the assignment that counts their moves. Within a transaction that writes."""

from sqlalchemy import or_, select, update
from sqlalchemy.orm import Session

from modelfleet.manager.rollout_states import UNDECIDED
from modelfleet.manager.store.tables import AliasRow, AssignmentRevisionRow, RolloutRow
from modelfleet.runtime.errors import StateConflictError


def check_free(session: Session, model: str, alias: str) -> None:
    """Raise StateConflictError, with its number, where a rollout has the alias and has not moved it for good."""
    under_way = select(RolloutRow.rollout).filter_by(model=model, alias=alias).where(RolloutRow.state.in_(UNDECIDED))
    rollout = session.scalar(under_way)
    if rollout is not None:
        raise StateConflictError(
            f"The alias {alias!r} of model {model!r} is under rollout {rollout}. Abort that, or wait until it is over."
        )


def rollout_with(session: Session, model: str, model_version: int) -> int | None:
    """Return the number of a rollout that may still let its alias name the version, None where there is none."""
    names = or_(RolloutRow.model_version == model_version, RolloutRow.old_model_version == model_version)
    query = select(RolloutRow.rollout).filter_by(model=model).where(names, RolloutRow.state.in_(UNDECIDED))
    return session.scalar(query)


def point(session: Session, model: str, alias: str, model_version: int) -> bool:
    """Let an alias name a version, 0 for none, and return whether it did not before."""
    row = session.get(AliasRow, (model, alias))
    if (row.model_version if row else 0) == model_version:
        return False
    if row is None:
        session.add(AliasRow(model=model, alias=alias, model_version=model_version))
    elif model_version:
        row.model_version = model_version
    else:
        session.delete(row)
    next_revision(session)
    return True


def next_revision(session: Session) -> int:
    """Count the revision of the assignment up and return it: workers are to be told of something new."""
    revision = AssignmentRevisionRow.revision
    return session.execute(update(AssignmentRevisionRow).values(revision=revision + 1).returning(revision)).scalar_one()
