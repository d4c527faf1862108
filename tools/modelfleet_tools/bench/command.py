"""`modelfleet bench`."""

import asyncio
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from modelfleet.client import AsyncClient
from modelfleet.runtime.errors import UnavailableError, WrongTaskError

from modelfleet_tools.extras import needs_extra
from modelfleet_tools.named_version import named_version
from modelfleet_tools.options import InferenceOption, JsonOption
from modelfleet_tools.output import print_json, tell
from modelfleet_tools.requests import ModelArgument, TruncationOption, WindowOption

if TYPE_CHECKING:
    from modelfleet.client.answers import ServedModel

    from modelfleet_tools.bench.load import ClosedLoop, OpenLoop
    from modelfleet_tools.bench.report import Row

TASKS = ("embed", "classify", "entities", "rerank")


def bench(
    model: ModelArgument,
    *,
    rate: Annotated[
        str | None, typer.Option(metavar="R[,R]...", help="Open loop: requests a second, at random times.")
    ] = None,
    callers: Annotated[
        str | None, typer.Option(metavar="N[,N]...", help="Closed loop: callers that wait for answers [1,4,16].")
    ] = None,
    duration: Annotated[float, typer.Option(metavar="SECONDS", min=0.1, help="How long each load lasts.")] = 10,
    warmup: Annotated[float, typer.Option(metavar="SECONDS", min=0, help="Load before, which is not counted.")] = 1,
    texts_per_request: Annotated[int, typer.Option(min=1, help="Texts in a request; documents for rerank.")] = 1,
    texts: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="Texts: .txt, one a line, or .jsonl, .csv, .parquet."),
    ] = None,
    text_column: Annotated[str, typer.Option(help="The texts' column in such a file.")] = "text",
    median_words: Annotated[
        float, typer.Option(min=1, help="Without --texts: log-normal lengths of this median.")
    ] = 25,
    sigma: Annotated[float, typer.Option(min=0, help="Their spread; 0 makes all texts equally long.")] = 0.8,
    max_words: Annotated[int, typer.Option(min=1, help="No text is longer.")] = 180,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Write latency over throughput.")] = None,
    truncation: TruncationOption = "right",
    window_stride: WindowOption = None,
    timeout: Annotated[float, typer.Option(metavar="SECONDS", min=0.001, help="Longest wait for one answer.")] = 30,
    inference: InferenceOption = None,
    as_json: JsonOption = False,
) -> None:
    """
    Load a running cluster, and print throughput and latencies of each load.

    In open loops latency counts from when a request was due, so that waiting is not left out. Errors are counted by
    reason; their requests are in no percentile.

    Examples: modelfleet bench minilm --callers 1,8,64; modelfleet bench minilm --rate 20,50,100 --plot sweep.png
    """
    from modelfleet_tools.bars.texts import WordCounts  # noqa: PLC0415
    from modelfleet_tools.batch.tasks import Options, asker  # noqa: PLC0415  pyarrow, which other commands need not
    from modelfleet_tools.bench import report  # noqa: PLC0415
    from modelfleet_tools.bench.load import ClosedLoop, apply_load  # noqa: PLC0415
    from modelfleet_tools.bench.texts import made_up_texts, requests_of, texts_of_file  # noqa: PLC0415

    loads = _loads(rate, callers)
    if plot:
        with needs_extra("evaluate"):
            from modelfleet_tools.bench.plot import write_plot  # noqa: PLC0415  with its extra only
    words = WordCounts(median_words, sigma, min(3, max_words), max_words)
    sampled = texts_of_file(texts, text_column) if texts else made_up_texts(words)

    async def work() -> "tuple[ServedModel, list[Row]]":
        async with AsyncClient(inference=inference, timeout_s=timeout, tries_when_full=1) as client:
            served = await named_version(client, model)
            if served.task not in TASKS:
                raise WrongTaskError(
                    f"{model} is a model of the task {served.task!r}. Measured are {', '.join(TASKS)}."
                )
            requests = requests_of(sampled, served.task, texts_per_request)
            options = Options(truncation=truncation, window_stride=window_stride)
            ask = asker(client, served.task, f"{served.model}@{served.model_version}", options, timeout)
            if warmup:
                await apply_load(ask, requests, ClosedLoop(2), warmup)
            rows = []
            for load in loads:
                tell(f"{load} for {duration:g} s …")
                rows.append(report.row(await apply_load(ask, requests, load, duration)))
            return served, rows

    served, rows = asyncio.run(work())
    title = f"{served.task} by {served.model}@{served.model_version}, texts a request: {texts_per_request}"
    if plot:
        write_plot(plot, title, rows)
    if as_json:
        model_version = f"{served.model}@{served.model_version}"
        print_json({"model": model_version, "texts_per_request": texts_per_request, "rows": rows})
    else:
        report.print_rows(title, rows)
        if len([row for row in rows if row.p50_ms is not None]) > 1:
            print(report.terminal_plot(rows, color=sys.stdout.isatty()))
    if not any(row.p50_ms for row in rows):
        raise UnavailableError("No request was answered. The errors are in the table.")


def _loads(rate: str | None, callers: str | None) -> "list[OpenLoop | ClosedLoop]":
    from modelfleet_tools.bench.load import ClosedLoop, OpenLoop  # noqa: PLC0415  imports pyarrow

    if rate and callers:
        raise typer.BadParameter("Give --rate or --callers, not both.")
    try:
        if rate:
            rates = [float(one) for one in rate.split(",")]
            if min(rates) > 0:
                return [OpenLoop(one) for one in rates]
        else:
            numbers = [int(one) for one in (callers or "1,4,16").split(",")]
            if min(numbers) > 0:
                return [ClosedLoop(one) for one in numbers]
    except ValueError:
        pass
    raise typer.BadParameter(f"{rate or callers!r} is no list of positive numbers such as 1,4,16.")
