"""A wall clock that jumps moves no deadline, retry or canary: what waits, waits on the monotonic clock."""

import ast
from pathlib import Path

import modelfleet
import pytest

PACKAGE = Path(modelfleet.__file__).parent
WALL_CLOCKS = {"time.time", "time.time_ns", "datetime.now", "datetime.utcnow", "datetime.today"}


def reads_of_the_wall_clock(directory: Path) -> set[str]:
    """Each as `path: call`."""
    return {
        f"{path.relative_to(directory).as_posix()}: {ast.unparse(node.func)}"
        for path in directory.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ".".join(ast.unparse(node.func).rsplit(".", 2)[-2:]) in WALL_CLOCKS
    }


@pytest.mark.parametrize(
    ("package", "expected"),
    [
        # When a model answered last, which the Open Inference Protocol tells in seconds since the epoch.
        ("inference", {"statistics.py: time.time"}),
        # What chat templates may ask for as today.
        ("tokenizer", {"chat_renderer.py: datetime.now"}),
        # When the spans of a trace began and ended.
        ("runtime", {"tracing.py: time.time_ns"}),
        ("client", set()),
    ],
)
def test_only_what_is_told_to_people_is_read_from_the_wall_clock(package: str, expected: set[str]) -> None:
    assert reads_of_the_wall_clock(PACKAGE / package) == expected


def test_every_way_to_read_it_is_seen(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("import time, datetime\ntime.time()\ndatetime.datetime.now()\ntime.monotonic()\n")

    assert reads_of_the_wall_clock(tmp_path) == {"a.py: time.time", "a.py: datetime.datetime.now"}
