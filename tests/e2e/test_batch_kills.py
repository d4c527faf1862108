"""A batch run as a process of its own: killed, interrupted, out of disk."""

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import structlog
from harness.letters import Letters, served, serving_letters

pytestmark = pytest.mark.slow

ROWS = 12_000
WITH_LIMIT = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit})); "
COMMAND = "import modelfleet_tools.__main__ as command; command.main()"


@pytest.fixture
async def inference() -> AsyncIterator[str]:
    structlog.configure(logger_factory=structlog.ReturnLoggerFactory())
    letters = Letters(served=[served("letters", 1, aliases=["stable"])])
    async with serving_letters(letters) as targets:
        yield targets["inference"]
    structlog.reset_defaults()


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps({"text": f"row {'x' * (row % 11)}"}) + "\n" for row in range(ROWS)))
    return path


async def start(
    inference: str, texts: Path, output: Path, *more: str, limit: int | None = None
) -> asyncio.subprocess.Process:
    arguments = ("batch", "embed", "--model", "letters", "--input", str(texts), "--output", str(output), *more)
    code = (WITH_LIMIT.format(limit=limit) if limit else "") + COMMAND
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", code, *arguments, "--inference", inference),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )


async def finish(process: asyncio.subprocess.Process) -> tuple[int, str]:
    _, told = await process.communicate()
    assert process.returncode is not None
    return process.returncode, told.decode()


async def staged(process: asyncio.subprocess.Process, output: Path, rows: int) -> None:
    """Wait until so many rows are kept."""
    record = output.with_name(f"{output.name}.run.json")
    while process.returncode is None and (not record.exists() or json.loads(record.read_bytes())["rows"] < rows):  # noqa: ASYNC110  another process's file
        await asyncio.sleep(0.002)


@pytest.mark.parametrize("ending", ["jsonl.gz", "csv.zst", "parquet"])
async def test_a_run_killed_again_and_again_makes_what_an_unbroken_one_makes(
    inference: str, texts: Path, tmp_path: Path, ending: str
) -> None:
    unbroken, killed = tmp_path / f"unbroken.{ending}", tmp_path / f"killed.{ending}"
    code, told = await finish(await start(inference, texts, unbroken))
    assert code == 0, told

    codes = []
    for rows in (1000, 4000, 8000):
        process = await start(inference, texts, killed, "--resume")
        await staged(process, killed, rows)
        process.kill()
        codes.append((await finish(process))[0])
        with killed.with_name(f"{killed.name}.partial").open("ab") as partial:
            partial.write(b"half a chunk")
    code, told = await finish(await start(inference, texts, killed, "--resume"))

    assert code == 0, told
    assert codes == [-9, -9, -9]
    assert killed.read_bytes() == unbroken.read_bytes()
    assert not list(tmp_path.glob("*.partial*"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_an_interrupted_run_says_how_to_go_on(
    inference: str, texts: Path, tmp_path: Path, number: signal.Signals
) -> None:
    output = tmp_path / "out.jsonl"
    process = await start(inference, texts, output, "--max-requests", "1")
    await staged(process, output, 1000)
    process.send_signal(number)
    code, told = await finish(process)
    refused = await finish(await start(inference, texts, output))
    resumed, _ = await finish(await start(inference, texts, output, "--resume"))

    assert code == 130, told
    assert "--resume" in told
    assert "Traceback" not in told
    assert refused[0] == 1
    assert "begun and not finished" in refused[1]
    assert resumed == 0
    assert len(output.read_bytes().splitlines()) == ROWS


async def test_a_full_disk_ends_the_run_which_goes_on_when_there_is_room(
    inference: str, texts: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"

    code, told = await finish(await start(inference, texts, output, limit=300_000))
    resumed, _ = await finish(await start(inference, texts, output, "--resume"))

    assert code == 1
    assert "The disk is full" in told
    assert "Traceback" not in told
    assert resumed == 0
    assert len(output.read_bytes().splitlines()) == ROWS


async def test_two_runs_cannot_make_one_output(inference: str, texts: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    first = await start(inference, texts, output, "--max-requests", "1")
    await staged(first, output, 1000)
    first.send_signal(signal.SIGSTOP)
    code, told = await finish(await start(inference, texts, output, "--overwrite"))
    first.send_signal(signal.SIGCONT)

    assert code == 1
    assert "Another process is making" in told
    assert (await finish(first))[0] == 0
