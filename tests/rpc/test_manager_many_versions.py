"""What 200 versions leave behind."""

import os
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import psycopg
import pytest
from google.protobuf.duration_pb2 import Duration
from harness.bucket import Bucket
from harness.manager import Manager, push, running_manager
from harness.postgres import Postgres
from harness.s3 import S3
from modelfleet.api.manager.v1 import model_service_pb2 as pb
from modelfleet.api.manager.v1 import storage_service_pb2 as storage_pb

pytestmark = pytest.mark.slow
VERSIONS = 200
SHARED, OWN_BYTES = os.urandom(300_000), 20_000
TABLES = ("blobs", "models", "model_versions", "bundle_files", "aliases")


def disk_bytes(directory: Path) -> int:
    """Bytes of all files, and of the directories, as `du` counts them."""
    return sum(path.lstat().st_blocks * 512 for path in directory.rglob("*"))


async def push_one(manager: Manager, number: int) -> None:
    own = number.to_bytes(4, "big") + os.urandom(OWN_BYTES)
    await push(
        manager, "pii", {"model.onnx": own, "tokenizer.json": SHARED, "config.json": b"%d" % number}, alias="stable"
    )


async def delete_all_but_the_first(manager: Manager) -> None:
    await manager.models.SetAlias(pb.SetAliasRequest(model="pii", alias="stable", model_version=1))
    for number in range(2, VERSIONS + 2):
        await manager.models.DeleteModelVersion(pb.DeleteModelVersionRequest(model="pii", model_version=number))


async def collect(manager: Manager) -> storage_pb.CollectGarbageResponse:
    return await manager.storage.CollectGarbage(storage_pb.CollectGarbageRequest(grace_period=Duration()))


async def come_and_go(manager: Manager, measured: Callable[[], dict[str, int]]) -> tuple[dict[str, int], ...]:
    """Push and delete the versions; return what there was before, with all, and after the collection."""
    await push_one(manager, 1)
    await collect(manager)
    before = measured()
    for number in range(2, VERSIONS + 2):
        await push_one(manager, number)
    full = measured()
    await delete_all_but_the_first(manager)
    await collect(manager)
    after = measured()
    print(before, full, after, sep="\n")  # noqa: T201  the figures, with `-s`
    return before, full, after


async def test_on_one_machine_disk_and_database_return_to_where_they_were(tmp_path: Path) -> None:
    def measured() -> dict[str, int]:
        with closing(sqlite3.connect(tmp_path / "manager.db")) as database:
            rows = {table: database.execute(f"SELECT count(*) FROM {table}").fetchone()[0] for table in TABLES}
        # The shared memory of SQLite's readers is no data, and stays as it is while they are connected.
        files = [path for path in tmp_path.glob("manager.db*") if not path.name.endswith("-shm")]
        database_bytes = sum(path.stat().st_size for path in files)
        return {**rows, "database bytes": database_bytes, "blob bytes": disk_bytes(tmp_path / "blobs")}

    async with running_manager(tmp_path) as manager:
        before, full, after = await come_and_go(manager, measured)

    assert full["model_versions"] == VERSIONS + 1
    assert full["blob bytes"] - before["blob bytes"] > VERSIONS * OWN_BYTES
    assert after == before


async def test_in_a_cluster_bucket_and_database_return_to_where_they_were(
    tmp_path: Path, postgres: Postgres, s3: S3, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable, value in s3.environment.items():
        monkeypatch.setenv(variable, value)
    bucket: Bucket = s3.new_bucket()
    url = postgres.new_url()

    def measured() -> dict[str, int]:
        with psycopg.connect(url, autocommit=True) as database:
            rows = {table: database.execute(f"SELECT count(*) FROM {table}").fetchone()[0] for table in TABLES}
            sizes = 0
            for table in TABLES:
                # A server by itself (autovacuum) leaves the pages to the rows that come next.
                database.execute(f"VACUUM FULL {table}")
                sizes += database.execute("SELECT pg_table_size(%s::regclass)", [table]).fetchone()[0]
        return {**rows, "database bytes": sizes, "objects": len(bucket.names())}

    async with running_manager(tmp_path, database_url=url, blob_url=bucket.url) as manager:
        before, full, after = await come_and_go(manager, measured)

    assert full["model_versions"] == VERSIONS + 1
    assert full["database bytes"] > 2 * before["database bytes"]
    assert after == before
