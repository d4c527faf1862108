"""A registry over a database of its own, in SQLite and in PostgreSQL."""

from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import uuid4

import pytest
from harness.postgres import Postgres
from modelfleet.manager.registry import Registry
from modelfleet.manager.store.database import Database

NewUrl = Callable[[], str]


@pytest.fixture(params=["sqlite", "postgresql"])
def new_url(request: pytest.FixtureRequest, tmp_path: Path) -> NewUrl:
    """Returns the URL of another empty database at each call."""
    if request.param == "sqlite":
        return lambda: f"sqlite:///{tmp_path}/{uuid4().hex}.db"
    server: Postgres = request.getfixturevalue("postgres")
    return lambda: server.url(server.new_database())


@pytest.fixture
def new_database(new_url: NewUrl) -> Iterator[Callable[[], Database]]:
    """Returns another migrated database at each call."""
    made: list[Database] = []

    def make() -> Database:
        made.append(Database(new_url()))
        made[-1].migrate()
        return made[-1]

    yield make
    for database in made:
        database.close()


@pytest.fixture
def database(new_database: Callable[[], Database]) -> Database:
    return new_database()


@pytest.fixture
def registry(database: Database) -> Registry:
    return Registry(database, lambda: None)
