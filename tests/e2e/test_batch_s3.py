"""A batch run between prefixes of an object store, as the pod of a Job has it: nothing on a disk of its own."""

import asyncio
import gzip
import json
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import obstore
import pytest
import structlog
from harness.letters import Letters, served, serving_letters
from harness.s3 import S3
from obstore.store import from_url

pytestmark = pytest.mark.slow


@pytest.fixture
async def inference() -> AsyncIterator[str]:
    structlog.configure(logger_factory=structlog.ReturnLoggerFactory())
    letters = Letters(served=[served("letters", 1, aliases=["stable"])])
    async with serving_letters(letters) as targets:
        yield targets["inference"]
    structlog.reset_defaults()


async def test_objects_that_match_a_pattern_become_one_object(
    inference: str, s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    url = s3.new_bucket().url
    bucket = from_url(url, client_options={"allow_http": True})
    for part in range(3):
        lines = "".join(json.dumps({"id": f"{part}/{row}", "text": "x" * (part + 1)}) + "\n" for row in range(700))
        obstore.put(bucket, f"in/part-{part}.jsonl.gz", gzip.compress(lines.encode()))
    obstore.put(bucket, "in/deeper/part-9.jsonl.gz", b"not matched")
    command = ("batch", "embed", "--model", "letters", "--input", f"{url}/in/*.jsonl.gz", "--keep", "id")

    codes = []
    for more in ((), (), ("--resume",), ("--overwrite",)):
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "modelfleet_tools", *command, "--output", f"{url}/out.jsonl", *more),
            stderr=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env={**os.environ, "MODELFLEET_INFERENCE": inference},
            cwd=tmp_path,
        )
        _, told = await process.communicate()
        codes.append((process.returncode, told.decode()))

    assert [code for code, _ in codes] == [0, 1, 0, 0], codes
    assert "is there already" in codes[1][1]
    rows = [json.loads(line) for line in bytes(obstore.get(bucket, "out.jsonl").bytes()).splitlines()]
    assert [row["id"] for row in rows] == [f"{part}/{row}" for part in range(3) for row in range(700)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl.run.json"]
