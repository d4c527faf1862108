import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from harness.postgres import Postgres
from harness.small_disk import small_disk
from modelfleet.manager.store import database as database_module
from modelfleet.manager.store import migrations
from modelfleet.manager.store.database import Database
from modelfleet.manager.store.tables import AssignmentRevisionRow, BlobRow, ModelVersionRow, Table
from modelfleet.runtime.errors import DrainingError, StorageFullError, StorageUnreachableError
from sqlalchemy import MetaData, create_engine, delete, make_url, select, text
from sqlalchemy import Table as SqlTable
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.orm import Session

DRIVERS = {"sqlite": "sqlite", "postgresql": "postgresql+psycopg"}


def reflected(session: Session) -> dict[str, SqlTable]:
    metadata = MetaData()
    metadata.reflect(session.connection())
    return dict(metadata.tables)


def test_migrations_make_the_tables_that_the_code_has(database: Database) -> None:
    with database.reading() as session:
        context = MigrationContext.configure(session.connection(), opts={"compare_type": True})
        assert compare_metadata(context, Table.metadata) == []
        assert context.get_current_heads() == tuple(ScriptDirectory(str(Path(migrations.__file__).parent)).get_heads())


def test_migrating_again_changes_nothing(database: Database) -> None:
    def rows() -> dict[str, list[tuple[object, ...]]]:
        with database.reading() as session:
            tables = reflected(session)
            return {name: [tuple(row) for row in session.execute(select(table))] for name, table in tables.items()}

    before = rows()
    database.migrate()
    assert rows() == before


def test_managers_that_start_at_once_migrate_once(new_url: Callable[[], str]) -> None:
    url = new_url()

    def start(_: int) -> int:
        database = Database(url)
        database.migrate()
        with database.reading() as session:
            rows = session.scalars(select(AssignmentRevisionRow)).all()
        database.close()
        return len(rows)

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(start, range(4))) == [1, 1, 1, 1]


def test_migration_that_fails_leaves_the_schema_as_it_was(new_url: Callable[[], str]) -> None:
    url = new_url()
    engine = create_engine(make_url(url).set(drivername=DRIVERS[make_url(url).get_backend_name()]))
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE aliases (x INTEGER)"))  # in the way of the first migration
    database = Database(url)
    with pytest.raises(DBAPIError, match="already exists"):
        database.migrate()
    with database.reading() as session:
        assert list(reflected(session)) == ["aliases"]
    database.close()
    engine.dispose()


def test_write_that_raises_is_undone(database: Database) -> None:
    def write_and_fail() -> None:
        with database.writing() as session:
            session.get_one(AssignmentRevisionRow, 1).revision = 0
            session.flush()
            raise KeyError

    with pytest.raises(KeyError):
        write_and_fail()
    with database.reading() as session:
        assert session.get_one(AssignmentRevisionRow, 1).revision > 0


def test_readers_and_writers_do_not_wait_for_one_another(database: Database) -> None:
    blob = BlobRow(sha256="0" * 64, size=1, create_time=datetime.now(UTC))
    with database.reading() as reader:
        assert reader.scalars(select(BlobRow)).all() == []
        with database.writing() as writer:
            writer.add(blob)
        assert reader.scalars(select(BlobRow)).all() == []  # sees one moment
    with database.reading() as reader:
        assert len(reader.scalars(select(BlobRow)).all()) == 1


def test_closing_waits_for_who_is_at_work_and_refuses_who_comes_later(database: Database) -> None:
    at_work, closing = threading.Event(), threading.Event()

    def work() -> int:
        with database.reading() as session:
            at_work.set()
            closing.wait()
            return len(session.scalars(select(AssignmentRevisionRow)).all())

    with ThreadPoolExecutor(2) as threads:
        working = threads.submit(work)
        at_work.wait()
        closed = threads.submit(database.close)
        with pytest.raises(TimeoutError):
            closed.result(0.1)
        closing.set()
        closed.result(10)
        assert working.result() == 1
    with pytest.raises(DrainingError), database.writing():
        pass


def test_references_are_enforced(database: Database) -> None:
    now = datetime.now(UTC)
    orphan = ModelVersionRow(
        model="nobody", model_version=1, bundle_digest="", task="", manifest_json="", create_time=now
    )
    with pytest.raises(IntegrityError, match=r"(?i)foreign key"), database.writing() as session:
        session.add(orphan)


def test_server_that_is_away_is_worth_a_retry_and_found_again_when_it_is_back(postgres: Postgres) -> None:
    database = Database(postgres.new_url())
    database.migrate()
    postgres.stop()
    try:
        for session_of in (database.reading, database.writing):
            with pytest.raises(StorageUnreachableError, match="does not answer"), session_of() as session:
                session.execute(select(AssignmentRevisionRow)).all()
    finally:
        postgres.start()
    with database.writing() as session:
        assert session.scalars(select(AssignmentRevisionRow)).one()
    database.close()


def test_server_that_goes_in_the_middle_of_a_write_leaves_nothing_of_it(postgres: Postgres) -> None:
    database = Database(postgres.new_url())
    database.migrate()

    def write_while_it_goes() -> None:
        with database.writing() as session:
            session.add(BlobRow(sha256="0" * 64, size=1, create_time=datetime.now(UTC)))
            session.flush()
            postgres.stop()

    try:
        with pytest.raises(StorageUnreachableError):
            write_while_it_goes()
    finally:
        postgres.start()
    with database.reading() as session:
        assert session.scalars(select(BlobRow)).all() == []
    database.close()


def test_who_waits_too_long_for_another_writer_is_told_to_retry(
    new_url: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database_module, "_BUSY_TIMEOUT_MS", 200)
    url = new_url()
    one, other = Database(url), Database(url)
    one.migrate()

    def wait_for_the_other() -> None:
        with other.writing():
            pass

    with ThreadPoolExecutor(1) as threads, one.writing():
        waiting = threads.submit(wait_for_the_other)
        with pytest.raises(StorageUnreachableError, match="does not answer"):
            waiting.result(20)
    wait_for_the_other()
    one.close()
    other.close()


def test_a_manager_that_freezes_in_the_middle_of_a_write_does_not_stop_the_others(
    postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database_module, "_IDLE_TIMEOUT_MS", 200)
    url = postgres.new_url()
    frozen, other = Database(url), Database(url)
    frozen.migrate()

    def go_on_after_the_others() -> None:
        with frozen.writing() as session:
            session.add(BlobRow(sha256="0" * 64, size=1, create_time=datetime.now(UTC)))
            session.flush()
            with ThreadPoolExecutor(1) as threads:
                threads.submit(write_one).result(20)

    def write_one() -> None:
        with other.writing() as session:
            session.add(BlobRow(sha256="1" * 64, size=1, create_time=datetime.now(UTC)))

    with pytest.raises(StorageUnreachableError):
        go_on_after_the_others()
    with frozen.reading() as session:
        assert [row.sha256 for row in session.scalars(select(BlobRow))] == ["1" * 64]
    frozen.close()
    other.close()


def test_full_disk_is_told_and_leaves_what_was_written_before(tmp_path: Path) -> None:
    with small_disk(tmp_path, kib=512) as disk:
        database = Database(f"sqlite:///{disk}/manager.db")
        database.migrate()
        written = 0

        def write_until_full() -> None:
            nonlocal written
            while True:
                with database.writing() as session:
                    for number in range(written, written + 100):
                        session.add(BlobRow(sha256=f"{number:064}", size=1, create_time=datetime.now(UTC)))
                written += 100

        with pytest.raises(StorageFullError, match="disk of the manager's database is full"):
            write_until_full()
        with database.reading() as session:
            assert len(session.scalars(select(BlobRow)).all()) == written > 0
        database.close()


def test_compacting_gives_the_disk_back_what_was_deleted(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path}/manager.db")
    database.migrate()
    database.compact()

    def size() -> int:
        return sum(path.stat().st_size for path in tmp_path.glob("manager.db*") if not path.name.endswith("-shm"))

    before = size()
    with database.writing() as session:
        session.add_all(BlobRow(sha256=f"{n:064}", size=1, create_time=datetime.now(UTC)) for n in range(5000))
    with database.writing() as session:
        session.execute(delete(BlobRow))
    assert size() > 5 * before

    database.compact()

    assert size() == before
    database.close()
