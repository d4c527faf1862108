"""
200,000 rows through `modelfleet batch`, killed with -9 five times, beside an unbroken run.

A tiny model answers, so that the client is what is measured. Its numbers are such that sums are exact: floats of real
models differ in the last digit with the batch that they were part of. Checks that the outputs are equal byte for byte
and that the client's peak memory is under 300 MB. Then, with MiniLM in fp32, texts a second of `batch` beside a closed
loop of the same request size, in turns; the median of their ratios should be 0.9 or more.
"""

import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from modelfleet.bundle.directory import open_directory
from modelfleet.client import AsyncClient, Client
from modelfleet_tools.bars.minilm_fp32 import minilm_fp32
from modelfleet_tools.bars.texts import sample_texts
from modelfleet_tools.cluster import LocalCluster
from onnx import numpy_helper
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parents[1]))
from harness import graphs  # after the path to it

KILLS = 5
MOST_BYTES = 300e6
LEAST_RATIO = 0.9
REQUEST_TEXTS = 32
CALLERS = 2

say = Console(highlight=False, soft_wrap=True).print


def main(
    rows: Annotated[int, typer.Option(help="Rows for the tiny model.")] = 200_000,
    texts: Annotated[int, typer.Option(help="Texts for MiniLM, in each turn.")] = 768,
    turns: Annotated[int, typer.Option(help="Turns with MiniLM.")] = 3,
    cache: Annotated[Path, typer.Option(help="Where the exported model is kept.")] = Path(".cache"),
) -> None:
    """Kill a batch run again and again, and measure an unbroken one."""
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        with serving(folder / "cluster", {"tiny": tiny(folder), "minilm": minilm_fp32(cache)}) as inference:
            holds = [kills(folder, inference, rows), throughput(folder, inference, texts, turns)]
    sys.exit(not all(holds))


def tiny(folder: Path) -> Path:
    """Return the folder of a small embedding model."""
    graph = graphs.pooled_embedder()
    (table,) = (tensor for tensor in graph.graph.initializer if tensor.name == "table")
    table.CopyFrom(numpy_helper.from_array(np.round(numpy_helper.to_array(table) * 64) / 64, "table"))
    sample = graphs.text_bundle(graph, graphs.Task.EMBED, pooling="model")
    path = graphs.write(sample, folder / "tiny")
    (path / "modelfleet.yaml").write_text(json.dumps(sample.bundle.manifest.model_dump(mode="json")))
    return path


@contextmanager
def serving(data_dir: Path, models: dict[str, Path]) -> Iterator[str]:
    """Serve the models; yield where."""
    with LocalCluster(data_dir) as cluster:
        addresses = cluster.addresses
        with Client(inference=addresses.inference, manager=addresses.manager) as client:
            for name, path in models.items():
                bundle, paths = open_directory(path)
                client.push(bundle, paths, name, alias="stable")
                client.wait_until_served(name, timeout_s=120)
        yield addresses.inference


def kills(folder: Path, inference: str, rows: int) -> bool:
    """Compare a run that is killed with one that is not."""
    source = folder / "rows.jsonl"
    words = ("the", "cat", "sat", "on", "mat", "hello", "world", "token")
    with source.open("w") as file:
        for row in range(rows):
            text = " ".join(words[(row * step) % len(words)] for step in range(1, 2 + row % 11))
            file.write(json.dumps({"id": row, "text": text}) + "\n")
    unbroken, killed = folder / "unbroken.jsonl", folder / "killed.jsonl"
    code, peak, seconds = finish(start("tiny", inference, source, unbroken))
    say(f"unbroken: exit {code}, {rows / seconds:,.0f} rows/s, peak memory {peak / 1e6:.0f} MB")
    peaks, codes = [peak], [code]
    for number in range(1, KILLS + 1):
        process, since = start("tiny", inference, source, killed, "--resume")
        wait_for_rows(process, killed, number * rows // (KILLS + 1))
        peak = peak_bytes(process)
        process.kill()
        code, _, _ = finish((process, since))
        codes.append(code)
        peaks.append(peak)
        say(f"killed at {kept(killed):,} rows: exit {code}, peak memory {peak / 1e6:.0f} MB")
    code, peak, _ = finish(start("tiny", inference, source, killed, "--resume"))
    equal = unbroken.read_bytes() == killed.read_bytes()
    lines = unbroken.read_bytes().count(b"\n")
    say(f"resumed to the end: exit {code}; {lines:,} rows; outputs equal byte for byte: {equal}")
    say(f"peak memory over all runs: {max(*peaks, peak) / 1e6:.0f} MB")
    return equal and lines == rows and code == 0 and codes == [0, *[-9] * KILLS] and max(*peaks, peak) < MOST_BYTES


def throughput(folder: Path, inference: str, count: int, turns: int) -> bool:
    """Compare `batch` with a closed loop of the same request size."""
    texts = sample_texts(count)
    source, output = folder / "texts.jsonl", folder / "vectors.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    with Client(inference=inference, timeout_s=120) as client:  # which also warms up
        usage = client.embed("minilm", texts).usage
    request_tokens = REQUEST_TEXTS * sum(one.token_count for one in usage) // len(usage)
    ratios = []
    for _ in range(turns):
        before = asyncio.run(closed_loop(inference, texts))
        command = [*command_line("minilm", inference, source, output), "--overwrite", "--json"]
        command += ["--request-tokens", str(request_tokens)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        rate = json.loads(done.stdout)["rows_per_s"]
        after = asyncio.run(closed_loop(inference, texts))
        ratios.append(rate / statistics.mean((before, after)))
        say(f"closed loop {before:.1f}, batch {rate:.1f}, closed loop {after:.1f} texts/s: ratio {ratios[-1]:.3f}")
    say(f"median ratio {statistics.median(ratios):.3f}")
    return statistics.median(ratios) >= LEAST_RATIO


async def closed_loop(inference: str, texts: list[str]) -> float:
    """Return texts a second of two callers with 32 texts a request, as `make bench` measures."""
    requests = (texts[first : first + REQUEST_TEXTS] for first in range(0, len(texts), REQUEST_TEXTS))
    async with AsyncClient(inference=inference, timeout_s=120) as client:

        async def caller() -> None:
            for request in requests:
                await client.embed("minilm", request)

        started = time.perf_counter()
        await asyncio.gather(*(caller() for _ in range(CALLERS)))
        return len(texts) / (time.perf_counter() - started)


def command_line(model: str, inference: str, source: Path, output: Path) -> list[str]:
    """Return the command."""
    named = ("--model", model, "--inference", inference, "--input", str(source), "--output", str(output))
    return [sys.executable, "-m", "modelfleet_tools", "batch", "embed", *named]


def start(
    model: str, inference: str, source: Path, output: Path, *more: str
) -> tuple["subprocess.Popen[bytes]", float]:
    """Start a run; return it and when."""
    command = [*command_line(model, inference, source, output), *more]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL), time.monotonic()


def finish(started: tuple["subprocess.Popen[bytes]", float]) -> tuple[int, int, float]:
    """Return the exit code, the peak of resident memory in bytes, and the seconds."""
    process, since = started
    peak = peak_bytes(process)
    while process.poll() is None:
        peak = max(peak, peak_bytes(process))
        time.sleep(0.01)
    return process.wait(), peak, time.monotonic() - since


def peak_bytes(process: "subprocess.Popen[bytes]") -> int:
    """Return the most that was resident since the process runs its program; rusage counts what forked it, too."""
    for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def wait_for_rows(process: "subprocess.Popen[bytes]", output: Path, rows: int) -> None:
    """Wait until so many rows are kept, or the run ends."""
    while kept(output) < rows and process.poll() is None:
        time.sleep(0.01)


def kept(output: Path) -> int:
    """Return how many rows the run has kept."""
    record = output.with_name(f"{output.name}.run.json")
    return int(json.loads(record.read_bytes())["rows"]) if record.exists() else 0


if __name__ == "__main__":
    typer.run(main)
