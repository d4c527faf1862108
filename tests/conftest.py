"""Servers that the whole run shares, started when the first test asks for them."""

from collections.abc import Iterator

import pytest
from harness.postgres import Postgres, running_postgres
from harness.s3 import S3, running_s3


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    with running_postgres() as server:
        yield server


@pytest.fixture(scope="session")
def s3() -> Iterator[S3]:
    with running_s3() as endpoint:
        yield endpoint
