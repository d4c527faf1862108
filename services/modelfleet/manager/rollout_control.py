"""
The leading manager's loop: observes, decides, and stores what it decided, from which assignments follow.

Level-triggered: each round looks at everything anew, so that a manager that dies, or one that takes over, only ever
begins a round again.
"""

import asyncio
import time
from collections.abc import Callable
from datetime import UTC, datetime

import structlog
from sqlalchemy import or_, select
from sqlalchemy.orm import Session

from modelfleet.manager.leadership import Leadership
from modelfleet.manager.rollout_decisions import Next, Rollout, decide
from modelfleet.manager.rollout_states import HOLDING_BOTH, OPEN
from modelfleet.manager.rollouts import enter, to_rollout
from modelfleet.manager.store.database import Database
from modelfleet.manager.store.tables import AliasRow, RolloutRow
from modelfleet.manager.workers import Workers, WorkerStatus

_INTERVAL_S = 0.5  # reports may have come to other managers, and time passes
_FORGET_INTERVAL_S = 10.0

_log = structlog.get_logger()


class RolloutControl:
    """Moves rollouts on, while this manager leads. `changed` is called after each change of the assignment."""

    def __init__(
        self, database: Database, workers: Workers, leadership: Leadership, changed: Callable[[], None]
    ) -> None:
        self._database = database
        self._workers = workers
        self._leadership = leadership
        self._changed = changed
        self._due = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._forgot = 0.0
        self._since: dict[tuple[int, int], float] = {}  # by rollout and number of events
        workers.on_report(self.wake)

    def wake(self) -> None:
        """Have a round begin now: there is news. May be called from any thread."""
        self._loop.call_soon_threadsafe(self._due.set)

    async def run(self) -> None:
        """Begin round after round until cancelled."""
        try:
            while True:
                self._due.clear()
                try:
                    await asyncio.to_thread(self.round)
                except Exception:  # noqa: BLE001  whatever it is, such as a database that is away: the next round begins anew
                    _log.exception("round of rollouts failed")
                    await asyncio.sleep(_INTERVAL_S)
                await self._wait()
        finally:
            await self._resign()

    async def _resign(self) -> None:
        try:
            await asyncio.to_thread(self._leadership.resign)
        except Exception as error:  # noqa: BLE001  without a database the lease ends by itself
            _log.warning("lease not given up", error=str(error))

    async def _wait(self) -> None:
        try:
            async with asyncio.timeout(_INTERVAL_S):
                await self._due.wait()
        except TimeoutError:
            pass

    def round(self) -> None:
        """Move every rollout on as far as it goes now. Blocking."""
        if not self._leadership.campaign():
            return
        if time.monotonic() - self._forgot > _FORGET_INTERVAL_S:
            self._forgot = time.monotonic()
            self._workers.forget_silent()
        while self._move_all():
            self._changed()

    def _move_all(self) -> bool:
        with self._database.reading() as session:
            rows = session.scalars(select(RolloutRow).where(RolloutRow.state.in_(OPEN)).order_by(RolloutRow.rollout))
            rollouts = [(to_rollout(row), _old_is_named(session, row)) for row in rows]
        if not rollouts:
            return False
        workers = self._workers.current()
        self._since = {_moment(rollout): self._entered(rollout) for rollout, _ in rollouts}
        moved = False
        for rollout, old_is_named in rollouts:
            elapsed_s = time.monotonic() - self._since[_moment(rollout)]
            following = decide(rollout, workers, elapsed_s, old_is_named=old_is_named)
            moved |= following is not None and self._enter(rollout, following, workers)
        return moved

    def _entered(self, rollout: Rollout) -> float:
        """
        Return when a rollout became what it is, on the monotonic clock.

        The wall clock says so once, to a manager that sees it for the first time: when it jumps afterwards, that ends
        no step and no rollback window.
        """
        elapsed = datetime.now(UTC) - rollout.events[-1].time
        return self._since.get(_moment(rollout), time.monotonic() - max(0.0, elapsed.total_seconds()))

    def _enter(self, rollout: Rollout, following: Next, workers: tuple[WorkerStatus, ...]) -> bool:
        with self._database.writing() as session:
            row = session.get_one(RolloutRow, rollout.rollout)
            # Somebody may have aborted or promoted it since it was read, or another manager may lead by now.
            if len(row.events) != len(rollout.events) or not self._leadership.holds(session):
                return False
            enter(session, row, following, workers)
        return True


def _moment(rollout: Rollout) -> tuple[int, int]:
    return rollout.rollout, len(rollout.events)


def _old_is_named(session: Session, row: RolloutRow) -> bool:
    """Return whether anything but this rollout assigns its old version; there may be none."""
    old = row.old_model_version
    alias = select(AliasRow.alias).filter_by(model=row.model, model_version=old)
    names = or_(RolloutRow.model_version == old, RolloutRow.old_model_version == old)
    other = select(RolloutRow.rollout).filter_by(model=row.model).where(names, RolloutRow.state.in_(HOLDING_BOTH))
    named_by = (*session.scalars(alias), *session.scalars(other.where(RolloutRow.rollout != row.rollout)))
    return not old or bool(named_by)
