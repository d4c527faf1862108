"""Each step of the schema keeps what the steps before it have stored."""

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from alembic.script import ScriptDirectory
from modelfleet.bundle.reference import ModelReference
from modelfleet.manager.registry import Registry
from modelfleet.manager.store import migrations
from modelfleet.manager.store.database import Database
from modelfleet.manager.store.tables import AssignmentRevisionRow, BlobRow
from modelfleet.runtime.paging import PageRequest
from sqlalchemy import Column, MetaData, select

REVISIONS = [
    script.revision
    for script in reversed(list(ScriptDirectory(str(Path(migrations.__file__).parent)).walk_revisions()))
]
CREATED = datetime(2024, 2, 29, 12, 30, 45, 678901, tzinfo=UTC)
# As the first release wrote it. UtcDateTime keeps times without a zone.
FIRST_DATA = {
    "blobs": [{"sha256": digit * 64, "size": 2**40, "create_time": CREATED.replace(tzinfo=None)} for digit in "ab"],
    "models": [{"model": "pii", "last_model_version": 7, "create_time": CREATED.replace(tzinfo=None)}],
    "model_versions": [
        {
            "model": "pii",
            "model_version": number,
            "bundle_digest": str(number) * 64,
            "task": "tensor",
            "manifest_json": '{"model":"model.onnx","task":"tensor"}',
            "create_time": CREATED.replace(tzinfo=None),
        }
        for number in (3, 7)
    ],
    "bundle_files": [
        {"model": "pii", "model_version": number, "path": "model.onnx", "sha256": digit * 64, "size": 2**40}
        for number, digit in ((3, "a"), (7, "b"))
    ],
    "aliases": [{"model": "pii", "alias": "stable", "model_version": 3}],
}


def insert(database: Database) -> None:
    with database.writing() as session:
        metadata = MetaData()
        metadata.reflect(session.connection())
        for table, rows in FIRST_DATA.items():
            session.execute(metadata.tables[table].insert(), rows)


@pytest.mark.parametrize("in_one_step", [True, False])
def test_data_of_the_first_release_is_all_there_after_the_last_migration(
    new_url: Callable[[], str], in_one_step: bool
) -> None:
    database = Database(new_url())
    database.migrate_to(REVISIONS[0])
    insert(database)
    with database.reading() as session:
        revision = session.scalar(select(AssignmentRevisionRow.revision))

    for step in ["head"] if in_one_step else REVISIONS[1:]:
        database.migrate_to(step)

    registry = Registry(database, lambda: None)
    (model,) = registry.models(PageRequest()).items
    assert (model.model, model.latest_model_version, model.create_time) == ("pii", 7, CREATED)
    assert [(alias.alias, alias.model_version) for alias in model.aliases] == [("stable", 3)]
    assert model.pools == ()
    version = registry.model_version(ModelReference.parse("pii"))
    assert (version.model_version, version.bundle_digest) == (3, "3" * 64)
    assert [(file.path, file.sha256, file.size) for file in version.files] == [("model.onnx", "a" * 64, 2**40)]
    with database.reading() as session:
        assert session.scalar(select(AssignmentRevisionRow.revision)) == revision
        blobs = session.scalars(select(BlobRow)).all()
        assert {(blob.sha256, blob.create_time, blob.last_used_time) for blob in blobs} == {
            ("a" * 64, CREATED, None),
            ("b" * 64, CREATED, None),
        }
    database.close()


def test_a_database_that_grew_step_by_step_is_that_of_a_new_one(new_url: Callable[[], str]) -> None:
    def schema(steps: list[str]) -> dict[str, list[str]]:
        database = Database(new_url())
        for step in steps:
            database.migrate_to(step)
        with database.reading() as session:
            metadata = MetaData()
            metadata.reflect(session.connection())
        database.close()
        return {name: sorted(map(described, table.columns)) for name, table in metadata.tables.items()}

    def described(column: Column[Any]) -> str:
        default = column.server_default
        return f"{column.name} {column.type!r} null={column.nullable} default={default and default.arg.text}"

    assert schema(REVISIONS) == schema(["head"])
