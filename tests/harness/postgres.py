"""A real PostgreSQL of Debian's packages for tests, on a socket in a directory of its own."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import psycopg
import pytest

# Not by code point, so that a query that forgets to ask for that is found out.
_AS_PEOPLE_SORT = ("--locale=C.UTF-8", "--locale-provider=icu", "--icu-locale=en-US")
_MISSING = "PostgreSQL is not installed: `apt-get install -y postgresql` (as root, `make test` does it)."


@contextmanager
def running_postgres() -> Iterator["Postgres"]:
    """Run a server until the block ends. Skips the test, saying what to install, where there is none."""
    programs = _programs()
    directory = Path(
        tempfile.mkdtemp(prefix="modelfleet-pg-")
    )  # short: the path of a socket has at most 107 characters
    try:
        server = Postgres(directory, programs)
        server.start()
        try:
            yield server
        finally:
            server.stop()
    finally:
        shutil.rmtree(directory)


class Postgres:
    """A server, started and stopped at will."""

    def __init__(self, directory: Path, programs: Path) -> None:
        self._directory = directory
        self._programs = programs
        self._account: dict[str, object] = {}
        if os.geteuid() == 0:  # which PostgreSQL refuses to run as
            self._account = {"user": "postgres", "group": "postgres", "extra_groups": []}
            shutil.chown(directory, "postgres", "postgres")
        self._run("initdb", "--no-sync", "--auth=trust", "--username=postgres", "--encoding=UTF8", *_AS_PEOPLE_SORT)

    def start(self) -> None:
        """Start the server and wait until it answers."""
        options = f"-c listen_addresses='' -c unix_socket_directories={self._directory} -c fsync=off"
        self._run("pg_ctl", "start", "--wait", "--silent", f"--log={self._directory}/log", f"--options={options}")

    def stop(self) -> None:
        """Stop the server at once, as a crash would."""
        self._run("pg_ctl", "stop", "--mode=immediate", "--silent")

    def new_database(self, template: str = "template1") -> str:
        """Return the name of a new database that has what the template has."""
        name = f"test_{uuid4().hex}"
        with psycopg.connect(self.url("postgres"), autocommit=True) as connection:
            connection.execute(f'CREATE DATABASE {name} TEMPLATE "{template}"')
        return name

    def url(self, database: str) -> str:
        """Return the URL of a database, as operators write it."""
        return f"postgresql://postgres@/{database}?host={self._directory}"

    def _run(self, program: str, *arguments: str) -> None:
        command = [self._programs / program, f"--pgdata={self._directory}/data", *arguments]
        # No pipe: the server would keep it open for as long as it runs.
        with (self._directory / "commands.log").open("a") as log:
            done = subprocess.run(command, cwd=self._directory, stdout=log, stderr=log, check=False, **self._account)
        if done.returncode:
            raise RuntimeError("".join(path.read_text() for path in self._directory.glob("*log")))


def _programs() -> Path:
    debian = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    found = debian[-1] if debian else shutil.which("initdb")
    if found is None:
        pytest.skip(_MISSING)
    return Path(found).resolve().parent
