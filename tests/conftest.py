"""Servers that the whole run shares, started when the first test asks for them."""

from collections.abc import Iterator

import pytest
from harness.postgres import Postgres, running_postgres


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    with running_postgres() as server:
        yield server
