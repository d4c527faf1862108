"""Which of several managers leads: whoever holds a lease in the database that they all share."""

import threading
import time
from collections.abc import Callable
from uuid import uuid4

import structlog
from sqlalchemy.orm import Session

from modelfleet.manager.store.database import Database
from modelfleet.manager.store.tables import LeaseRow

_LEASE = "leader"
_RENEWALS_PER_LEASE = 3

_log = structlog.get_logger()


class Leadership:
    """
    One manager's part in who leads. Blocking: call it from threads.

    The holder counts renewals up; the others take the lease once they have seen no renewal for as long as it lasts, on
    their own monotonic clocks. As in Kubernetes' leader election, clocks that differ or jump do no harm.
    """

    def __init__(self, database: Database, lease_s: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._database = database
        self._lease_s = lease_s
        self._clock = clock
        self._me = uuid4().hex
        self._lock = threading.Lock()
        self._led_until = 0.0
        self._seen: tuple[tuple[str, int], float] | None = None

    def campaign(self) -> bool:
        """Take the lease, or renew it when that is due, and return whether this manager leads."""
        with self._lock:
            now = self._clock()
            if now < self._led_until - self._lease_s * (1 - 1 / _RENEWALS_PER_LEASE):
                return True
            if not self._may_take(now):
                return False
            led = now < self._led_until
            self._take(now)
            if not led:
                _log.info("leading", lease_s=self._lease_s)
            return now < self._led_until

    def holds(self, session: Session) -> bool:
        """Return whether the lease is still this manager's, within a transaction that writes."""
        row = session.get(LeaseRow, _LEASE)
        return row is not None and row.holder == self._me

    def resign(self) -> None:
        """Give the lease up, for another manager to lead at once."""
        with self._lock, self._database.writing() as session:
            if self.holds(session):
                session.delete(session.get_one(LeaseRow, _LEASE))
            self._led_until = 0.0

    def _may_take(self, now: float) -> bool:
        with self._database.reading() as session:
            row = session.get(LeaseRow, _LEASE)
            if row is None or row.holder == self._me:
                return True
            if self._seen is None or self._seen[0] != (row.holder, row.renewals):
                self._seen = ((row.holder, row.renewals), now)
            return now - self._seen[1] >= row.duration_s

    def _take(self, now: float) -> None:
        with self._database.writing() as session:
            row = session.get(LeaseRow, _LEASE)
            if row is None:
                row = LeaseRow(lease=_LEASE, holder=self._me, renewals=0, duration_s=self._lease_s)
                session.add(row)
            elif row.holder != self._me and (self._seen is None or self._seen[0] != (row.holder, row.renewals)):
                return  # another was faster
            row.holder, row.duration_s = self._me, self._lease_s
            row.renewals += 1
        self._led_until = now + self._lease_s
