"""A registry over a database of its own."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from modelfleet.manager.registry import Registry
from modelfleet.manager.store.database import Database


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    database = Database(f"sqlite:///{tmp_path}/manager.db")
    database.migrate()
    yield database
    database.close()


@pytest.fixture
def registry(database: Database) -> Registry:
    return Registry(database, lambda: None)
