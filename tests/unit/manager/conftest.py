"""A registry and blobs of their own: in SQLite and a directory, and in PostgreSQL and S3."""

from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import uuid4

import pytest
from harness.bucket import Bucket
from harness.postgres import Postgres
from harness.s3 import S3
from modelfleet.manager.blob_store import BlobStore
from modelfleet.manager.blobs import Blobs
from modelfleet.manager.registry import Registry
from modelfleet.manager.store.database import Database

NewUrl = Callable[[], str]


@pytest.fixture(params=["sqlite", "postgresql"])
def backend(request: pytest.FixtureRequest) -> str:
    param: str = request.param
    return param


@pytest.fixture
def new_url(backend: str, request: pytest.FixtureRequest, tmp_path: Path) -> NewUrl:
    """Returns the URL of another empty database at each call."""
    if backend == "sqlite":
        return lambda: f"sqlite:///{tmp_path}/{uuid4().hex}.db"
    server: Postgres = request.getfixturevalue("postgres")
    return server.new_url


@pytest.fixture
def bucket(backend: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    """A directory beside SQLite, S3 beside PostgreSQL."""
    if backend == "sqlite":
        return Bucket((tmp_path / "blobs").as_uri())
    endpoint: S3 = request.getfixturevalue("s3")
    for name, value in endpoint.environment.items():
        monkeypatch.setenv(name, value)
    return endpoint.new_bucket()


@pytest.fixture
def store(bucket: Bucket) -> BlobStore:
    return BlobStore(bucket.url)


@pytest.fixture
def blobs(store: BlobStore, database: Database) -> Blobs:
    return Blobs(store, database)


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
