import subprocess
import sys

import pytest
from modelfleet.manager.__main__ import Settings
from pydantic import ValidationError

DATABASES = ["", "sqlite:///x.db", "postgresql://u:p@h/d", "postgres://h/d?sslmode=require", "postgresql+psycopg://h/d"]


@pytest.mark.parametrize("url", DATABASES)
def test_databases_are_named_as_operators_write_them(url: str) -> None:
    assert Settings(database_url=url).database_url == url


@pytest.mark.parametrize("url", ["x.db", "mysql://h/d", "postgresql", "://"])
def test_database_that_is_neither_of_the_two_is_refused(url: str) -> None:
    with pytest.raises(ValidationError, match="give sqlite:///PATH or postgresql://"):
        Settings(database_url=url)


@pytest.mark.parametrize("url", ["", "s3://bucket", "s3://bucket/a/prefix", "gs://b", "az://c/p", "file:///var/blobs"])
def test_blobs_go_to_a_directory_or_a_cloud(url: str) -> None:
    assert Settings(blob_url=url).blob_url == url


@pytest.mark.parametrize("url", ["/var/blobs", "s3://", "s3:bucket", "https://bucket", "memory:///"])
def test_place_where_blobs_cannot_be_kept_is_refused(url: str) -> None:
    with pytest.raises(ValidationError, match="give s3://BUCKET/PREFIX"):
        Settings(blob_url=url)


@pytest.mark.slow
def test_manager_without_its_database_ends_with_one_sentence() -> None:
    command = [sys.executable, "-m", "modelfleet.manager", "--port=0", "--metrics-port=0", "--host=127.0.0.1"]
    done = subprocess.run(
        [*command, "--database-url=postgresql://127.0.0.1:1/x"], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == ("The manager cannot start: The manager's database does not answer. Retry.")
    assert "Traceback" not in done.stderr
