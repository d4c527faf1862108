"""The database: SQLite or PostgreSQL by URL, brought to the newest schema, read and written in transactions."""

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import alembic.command
import alembic.config
import structlog
from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url, select, text
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import ArgumentError, DBAPIError, OperationalError
from sqlalchemy.orm import Session
from sqlalchemy.pool import ConnectionPoolEntry

from modelfleet.manager.store.tables import AssignmentRevisionRow
from modelfleet.runtime.errors import DrainingError, ModelfleetError, StorageFullError, StorageUnreachableError

_MIGRATIONS = Path(__file__).parent / "migrations"
_BUSY_TIMEOUT_MS = 30_000
# Of PostgreSQL: how long a writing transaction may rest, as that of a manager that has frozen does for ever, while all
# others wait. The longest rest is a garbage collection's, while it deletes from the object store.
_IDLE_TIMEOUT_MS = 120_000
# Of libpq, in seconds and the last in milliseconds: a server that vanishes without a word is given up in half a minute.
# https://www.postgresql.org/docs/current/libpq-connect.html
_CONNECTION = {
    "connect_timeout": "5",
    "keepalives_idle": "10",
    "keepalives_interval": "5",
    "keepalives_count": "4",
    "tcp_user_timeout": "30000",
}
_CLOSE_TIMEOUT_S = 30
_BACKENDS = {"sqlite", "postgresql", "postgres"}
_WRITES = "modelfleet_writes"
_MIGRATION_LOCK = 0x6D6F64656C  # any number that nobody else in the database locks
_FREE_SHARE = 0.25  # of SQLite's pages, from which on they are given back

_SQLITE_FULL = {sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_SHMSIZE}
_SQLITE_BUSY = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_BUSY_SNAPSHOT}
_POSTGRES_FULL = {"53100"}
# What PostgreSQL says when it starts, stops, fails over, has no connection left, gives up one of two transactions, or
# ends one that waits or rests for too long.
_POSTGRES_TRANSIENT = {"53300", "57P01", "57P02", "57P03", "40001", "40P01", "25006", "55P03", "25P03"}

_log = structlog.get_logger()


def check_database_url(url: str) -> None:
    """Raise ValueError unless a database can be opened by this URL."""
    try:
        backend = make_url(url).drivername.partition("+")[0]
    except ArgumentError:
        backend = ""
    if backend not in _BACKENDS:
        raise ValueError("give sqlite:///PATH or postgresql://USER:PASSWORD@HOST/DATABASE")


class Database:
    """
    Sessions on one database. Blocking: call it from threads.

    All that reads or writes raises StorageFullError when the disk is full, and StorageUnreachableError when the server
    cannot be reached.
    """

    def __init__(self, url: str) -> None:
        parsed = make_url(url)
        self.is_sqlite = parsed.drivername.partition("+")[0] == "sqlite"
        self._engine = _sqlite_engine(parsed) if self.is_sqlite else _postgres_engine(parsed)
        self._writer = self._engine.execution_options(**{_WRITES: True})
        self._reader = self._engine
        self._released = threading.Condition()
        self._users = 0
        self._closed = False
        if not self.is_sqlite:
            # A writer sees what the one before it committed while it waited for the lock; a reader sees one moment.
            self._reader = self._engine.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)

    @contextmanager
    def reading(self) -> Iterator[Session]:
        """Give a session that sees what was committed before."""
        with self._using(), Session(self._reader) as session, session.begin():
            yield session

    @contextmanager
    def writing(self) -> Iterator[Session]:
        """Give a session that commits when the block ends and rolls back when it raises; one at a time, everywhere."""
        with self._using(), Session(self._writer) as session, session.begin():
            # PostgreSQL waits here; SQLite has waited at BEGIN IMMEDIATE and knows no FOR UPDATE.
            session.execute(select(AssignmentRevisionRow).with_for_update())
            yield session

    def migrate(self) -> None:
        """Bring the schema to the newest revision, all in one transaction."""
        self.migrate_to("head")

    def migrate_to(self, revision: str) -> None:
        """Bring the schema to a revision, all in one transaction. Managers that start at once wait for one another."""
        config = alembic.config.Config()
        config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
        with self._using(), self._writer.begin() as connection:
            if not self.is_sqlite:
                connection.execute(text("SET LOCAL lock_timeout = 0"))  # a migration may take its time
                connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _MIGRATION_LOCK})
            config.attributes["connection"] = connection
            alembic.command.upgrade(config, revision)

    def compact(self) -> None:
        """Give SQLite's free pages back to the disk once they are many. PostgreSQL does so by itself (autovacuum)."""
        if not self.is_sqlite:
            return
        with self._using(), self._engine.connect() as connection:
            # Past SQLAlchemy, which would begin a transaction.
            cursor = connection.connection.cursor()
            (free,) = cursor.execute("PRAGMA freelist_count").fetchone()
            (pages,) = cursor.execute("PRAGMA page_count").fetchone()
            if free > pages * _FREE_SHARE:
                cursor.execute("VACUUM")
                _log.info("database compacted", pages_before=pages, pages_freed=free)
            cursor.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            cursor.close()

    def close(self) -> None:
        """Close all connections, once threads that use one are done with it. Whoever comes later gets DrainingError."""
        with self._released:
            self._closed = True
            self._released.wait_for(lambda: not self._users, timeout=_CLOSE_TIMEOUT_S)
        self._engine.dispose()

    @contextmanager
    def _using(self) -> Iterator[None]:
        with self._released:
            if self._closed:
                raise DrainingError("The manager is shutting down.")
            self._users += 1
        try:
            with _explained():
                yield
        finally:
            with self._released:
                self._users -= 1
                self._released.notify_all()


def _sqlite_engine(url: URL) -> Engine:
    engine = create_engine(url)
    if path := url.database:
        Path(path).parent.mkdir(parents=True, exist_ok=True)

    @event.listens_for(engine, "connect")
    def configure(connection: DBAPIConnection, _entry: ConnectionPoolEntry) -> None:
        connection.isolation_level = None  # transactions begin as below and nowhere else
        cursor = connection.cursor()
        cursor.execute(f"PRAGMA busy_timeout = {_BUSY_TIMEOUT_MS}")
        cursor.execute("PRAGMA journal_mode = WAL")  # readers and the writer do not wait for one another
        cursor.execute("PRAGMA synchronous = FULL")  # what was acknowledged outlives a power cut
        cursor.execute("PRAGMA foreign_keys = ON")
        cursor.close()

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        # A transaction that reads first and writes later could not take the lock once another has written in between.
        writes = connection.get_execution_options().get(_WRITES)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine


def _postgres_engine(url: URL) -> Engine:
    # `postgres://` and `postgresql://` are how operators write it; the driver is ours to choose.
    url = url.set(drivername="postgresql+psycopg", query={**_CONNECTION, **url.query})
    engine = create_engine(url, pool_pre_ping=True)  # connections die when the server is restarted or fails over

    @event.listens_for(engine, "connect")
    def configure(connection: DBAPIConnection, _entry: ConnectionPoolEntry) -> None:
        cursor = connection.cursor()
        cursor.execute(f"SET lock_timeout = {_BUSY_TIMEOUT_MS}")
        cursor.execute(f"SET idle_in_transaction_session_timeout = {_IDLE_TIMEOUT_MS}")
        cursor.close()
        connection.commit()

    return engine


@contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except DBAPIError as error:
        explained = _explanation(error)
        if explained is None:
            raise
        _log.warning("database failed", error=str(error.orig))
        raise explained from error


def _explanation(error: DBAPIError) -> ModelfleetError | None:
    sqlite_code, postgres_code = getattr(error.orig, "sqlite_errorcode", None), getattr(error.orig, "sqlstate", None)
    if sqlite_code in _SQLITE_FULL or postgres_code in _POSTGRES_FULL:
        return StorageFullError("The disk of the manager's database is full. Make room there, then retry.")
    lost = isinstance(error, OperationalError) and sqlite_code is None and postgres_code is None
    if sqlite_code in _SQLITE_BUSY or postgres_code in _POSTGRES_TRANSIENT or error.connection_invalidated or lost:
        return StorageUnreachableError("The manager's database does not answer. Retry.")
    return None
