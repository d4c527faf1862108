from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from modelfleet.manager.store import migrations
from modelfleet.manager.store.database import Database
from modelfleet.manager.store.tables import AssignmentRevisionRow, BlobRow, ModelVersionRow, Table
from sqlalchemy import select, text
from sqlalchemy.exc import IntegrityError


def test_migrations_make_the_tables_that_the_code_has(database: Database) -> None:
    with database.reading() as session:
        context = MigrationContext.configure(session.connection(), opts={"compare_type": True})
        assert compare_metadata(context, Table.metadata) == []
        assert context.get_current_heads() == tuple(ScriptDirectory(str(Path(migrations.__file__).parent)).get_heads())


def test_migrating_again_changes_nothing(database: Database) -> None:
    def dump() -> list[str]:
        with database.reading() as session:
            return list(session.connection().connection.driver_connection.iterdump())

    before = dump()
    database.migrate()
    assert dump() == before


def test_managers_that_start_at_once_migrate_once(tmp_path: Path) -> None:
    def start(_: int) -> int:
        database = Database(f"sqlite:///{tmp_path}/new/manager.db")
        database.migrate()
        with database.reading() as session:
            rows = session.scalars(select(AssignmentRevisionRow)).all()
        database.close()
        return len(rows)

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(start, range(4))) == [1, 1, 1, 1]


def test_migration_that_fails_leaves_the_schema_as_it_was(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path}/manager.db")
    with database.reading() as session:
        session.execute(text("CREATE TABLE aliases (x)"))  # in the way of the first migration
    with pytest.raises(Exception, match="already exists"):
        database.migrate()
    with database.reading() as session:
        names = session.scalars(text("SELECT name FROM sqlite_master WHERE type = 'table'")).all()
    database.close()
    assert names == ["aliases"]


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


def test_references_are_enforced(database: Database) -> None:
    now = datetime.now(UTC)
    orphan = ModelVersionRow(
        model="nobody", model_version=1, bundle_digest="", task="", manifest_json="", create_time=now
    )
    with pytest.raises(IntegrityError, match="FOREIGN KEY"), database.writing() as session:
        session.add(orphan)
