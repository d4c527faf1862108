"""The database: SQLite or PostgreSQL by URL, brought to the newest schema, read and written in transactions."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import alembic.command
import alembic.config
from sqlalchemy import Connection, Engine, create_engine, event, make_url, select
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.orm import Session
from sqlalchemy.pool import ConnectionPoolEntry

from modelfleet.manager.store.tables import AssignmentRevisionRow

_MIGRATIONS = Path(__file__).parent / "migrations"
_BUSY_TIMEOUT_MS = 30_000
_WRITES = "modelfleet_writes"


class Database:
    """Sessions on one database. Blocking: call it from threads."""

    def __init__(self, url: str) -> None:
        self._engine = _sqlite_engine(url) if make_url(url).get_backend_name() == "sqlite" else create_engine(url)
        self._writer = self._engine.execution_options(**{_WRITES: True})

    @contextmanager
    def reading(self) -> Iterator[Session]:
        """Give a session that sees what was committed before."""
        with Session(self._engine) as session, session.begin():
            yield session

    @contextmanager
    def writing(self) -> Iterator[Session]:
        """Give a session that commits when the block ends and rolls back when it raises; one at a time, everywhere."""
        with Session(self._writer) as session, session.begin():
            # PostgreSQL waits here; SQLite has waited at BEGIN IMMEDIATE and knows no FOR UPDATE.
            session.execute(select(AssignmentRevisionRow).with_for_update())
            yield session

    def migrate(self) -> None:
        """Bring the schema to the newest revision, all in one transaction."""
        config = alembic.config.Config()
        config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
        with self._writer.begin() as connection:
            config.attributes["connection"] = connection
            alembic.command.upgrade(config, "head")

    def close(self) -> None:
        """Close all connections."""
        self._engine.dispose()


def _sqlite_engine(url: str) -> Engine:
    engine = create_engine(url)
    if path := engine.url.database:
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
