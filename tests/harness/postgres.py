"""A real PostgreSQL of Debian's packages for tests, on a socket in a directory of its own."""

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import psycopg
import pytest

# Not by code point, so that a query that forgets to ask for that is found out.
_SORTING = ("--encoding=UTF8", "--locale=C.UTF-8", "--locale-provider=icu", "--icu-locale=en-US")
_START_S = 30
_MISSING = "PostgreSQL is not installed: `apt-get install -y postgresql` (as root, `make test` does it)."


@contextmanager
def running_postgres() -> Iterator["Postgres"]:
    """Run a server until the block ends. Skips the test, saying what to install, where there is none."""
    programs = _programs()
    # Not below the directory of a test: the path of a socket has at most 107 characters.
    directory = Path(tempfile.mkdtemp(prefix="modelfleet-pg-"))
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
        self._log = directory / "log"
        self._as_other: tuple[str, ...] = ()
        if os.geteuid() == 0:  # which PostgreSQL refuses to run as
            self._as_other = ("--reuid=postgres", "--regid=postgres", "--clear-groups")
            shutil.chown(directory, "postgres", "postgres")
        done = self._run("initdb", "--no-sync", "--auth=trust", "--username=postgres", *_SORTING)
        if done.wait():
            raise RuntimeError(self._log.read_text())

    def start(self) -> None:
        """Start the server and wait until it answers."""
        settings = ("listen_addresses=", f"unix_socket_directories={self._directory}", "fsync=off")
        self._process = self._run("postgres", *(f"-c{setting}" for setting in settings))
        until = time.monotonic() + _START_S
        while True:
            try:
                psycopg.connect(self._url).close()
            except psycopg.OperationalError as error:
                if time.monotonic() > until or self._process.poll() is not None:
                    raise RuntimeError(self._log.read_text()) from error
                time.sleep(0.02)
            else:
                return

    def stop(self) -> None:
        """Stop the server at once, as a crash would."""
        self._process.send_signal(signal.SIGQUIT)
        self._process.wait()

    def new_url(self) -> str:
        """Return the URL of another empty schema, which is to its users what a database is, but much sooner made."""
        name = f"test_{uuid4().hex}"
        with psycopg.connect(self._url, autocommit=True) as connection:
            connection.execute(f"CREATE SCHEMA {name}")
        return f"{self._url}&options=-csearch_path%3D{name}"

    @property
    def _url(self) -> str:
        return f"postgresql://postgres@/postgres?host={self._directory}"

    def _run(self, program: str, *arguments: str) -> "subprocess.Popen[bytes]":
        # It ends with the tests, also when these are killed.
        command = ["setpriv", "--pdeathsig=QUIT", *self._as_other, self._programs / program]
        command += ["-D", self._directory / "data", *arguments]
        with self._log.open("a") as log:
            return subprocess.Popen(command, cwd=self._directory, stdout=log, stderr=log)


def _programs() -> Path:
    debian = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    found = debian[-1] if debian else shutil.which("initdb")
    if found is None:
        pytest.skip(_MISSING)
    return Path(found).resolve().parent
