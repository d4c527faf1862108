"""`make bench`: one table of the bars, the baseline beside the cluster."""

import asyncio
import json
import statistics
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer
from modelfleet.bundle.directory import open_directory
from modelfleet.client import AsyncClient, Client
from rich.console import Console
from rich.table import Table

from modelfleet_tools.bars.baseline import Baseline
from modelfleet_tools.bars.measure import LOADS, MODEL, PADDING_LOAD, Clients, Round, measure
from modelfleet_tools.bars.minilm_fp32 import minilm_fp32
from modelfleet_tools.bars.texts import sample_texts
from modelfleet_tools.cluster import LocalCluster, Service

_MAX_ADDED_MS = 4.0
_MIN_PADDING_EFFICIENCY = 0.92
_LOAD_S = 120.0


@dataclass(frozen=True, slots=True)
class Bar:
    """A figure beside its goal."""

    name: str
    value: float
    goal: float
    holds: bool


def main(
    json_file: Annotated[Path | None, typer.Option(help="Also write the figures to this file.")] = None,
    texts: Annotated[int, typer.Option(help="Texts in each measurement of a round.", min=64)] = 256,
    rounds: Annotated[int, typer.Option(help="Rounds; figures are medians over them.", min=1)] = 9,
    cache: Annotated[Path, typer.Option(help="Where the exported model is kept.")] = Path(".cache"),
) -> None:
    """Measure a local cluster against a bare ONNX Runtime loop on fp32 MiniLM."""
    directory = minilm_fp32(cache)
    measured = asyncio.run(_measure(directory, sample_texts(texts), rounds))
    bars = _bars(measured)
    _print(bars, measured)
    if json_file:
        rows = [asdict(one) for one in measured]
        json_file.write_text(json.dumps({"bars": [asdict(bar) for bar in bars], "rows": rows}, indent=2) + "\n")


async def _measure(directory: Path, texts: list[str], rounds: int) -> list[Round]:
    bundle, paths = await asyncio.to_thread(open_directory, directory)
    baseline = Baseline(directory, bundle.manifest.max_tokens or 0)
    with tempfile.TemporaryDirectory() as data:
        async with LocalCluster(Path(data)) as cluster:
            addresses = cluster.addresses
            async with AsyncClient(inference=addresses.inference, manager=addresses.manager) as many:
                with Client(inference=addresses.inference) as one:
                    await many.push(bundle, paths, MODEL, alias="stable")
                    await many.wait_until_served(MODEL, timeout_s=_LOAD_S)
                    metrics_url = cluster.metrics_url(Service.INFERENCE)
                    return await measure(Clients(many, one), baseline, texts, metrics_url, rounds)


def _bars(measured: list[Round]) -> list[Bar]:
    bars = [
        _at_least(load.name, statistics.median(one.ratios[load.name] for one in measured), load.goal) for load in LOADS
    ]
    padding = statistics.median(one.padding_efficiency for one in measured)
    name = f"Padding efficiency at {PADDING_LOAD.callers} callers: real over padded tokens"
    bars.append(_at_least(name, padding, _MIN_PADDING_EFFICIENCY))
    added_ms = 1000 * statistics.median(one.single_cluster_s - one.single_baseline_s for one in measured)
    name = "p50 added at 1 caller over tokenizing and running in-process, ms"
    bars.append(Bar(name, round(added_ms, 3), _MAX_ADDED_MS, added_ms <= _MAX_ADDED_MS))
    return bars


def _at_least(name: str, value: float, goal: float) -> Bar:
    return Bar(name, round(value, 3), goal, value >= goal)


def _print(bars: list[Bar], measured: list[Round]) -> None:
    table = Table(title=f"Bars: medians of {len(measured)} rounds, each measuring everything in turn")
    for heading in ("bar", "value", "goal", "holds"):
        table.add_column(heading)
    for bar in bars:
        table.add_row(bar.name, f"{bar.value:.3f}", f"{bar.goal:.2f}", "yes" if bar.holds else "NO")
    details = Table(title="Rounds")
    rates_of_loads = (f"{load.callers} x {load.texts}, texts/s" for load in LOADS)
    for heading in ("R1, texts/s", *rates_of_loads, "1 caller, p50 ms", "in-process, p50 ms"):
        details.add_column(heading, justify="right")
    for one in measured:
        rates = (f"{one.loads[load.name]:.1f}" for load in LOADS)
        details.add_row(
            f"{one.baseline:.1f}", *rates, f"{1000 * one.single_cluster_s:.2f}", f"{1000 * one.single_baseline_s:.2f}"
        )
    console = Console()
    console.print(details)
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
