"""`modelfleet batch`."""

import asyncio
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from modelfleet.client import AsyncClient

from modelfleet_tools.exit_codes import ExitCode
from modelfleet_tools.options import InferenceOption, JsonOption
from modelfleet_tools.output import print_json, print_table, tell
from modelfleet_tools.requests import TruncationOption, WindowOption

if TYPE_CHECKING:
    from modelfleet_tools.batch.progress import Summary


def batch(
    task: Annotated[Literal["embed", "classify", "entities", "rerank"], typer.Argument(help="What to do with rows.")],
    *,
    model: Annotated[str, typer.Option("--model", "-m", help="NAME, NAME@ALIAS or NAME@NUMBER.")],
    source: Annotated[
        str,
        typer.Option(
            "--input",
            "-i",
            metavar="FILE|PATTERN|URL",
            help="JSONL, CSV (both also .gz, .zst) or Parquet: a file, 'a/*.csv' in quotes, or s3://BUCKET/PATH.",
        ),
    ],
    output: Annotated[
        str, typer.Option("--output", "-o", metavar="FILE|URL", help="Its name says the format, as of the input.")
    ],
    text_column: Annotated[str, typer.Option(help="The texts' column.")] = "text",
    query_column: Annotated[str, typer.Option(help="rerank: the queries' column.")] = "query",
    documents_column: Annotated[str, typer.Option(help="rerank: the column of a text or a list of texts.")] = (
        "documents"
    ),
    keep: Annotated[list[str] | None, typer.Option(help="Copy this column to the output; may be repeated.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where a run ended; begin if there is none.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Begin anew, and replace the output.")] = False,
    shard: Annotated[
        str | None,
        typer.Option(
            metavar="INDEX/COUNT", help="Do every COUNT-th row; the index may come from JOB_COMPLETION_INDEX."
        ),
    ] = None,
    work_dir: Annotated[
        Path | None, typer.Option(file_okay=False, help="Keeps what a resumed run needs [beside the output].")
    ] = None,
    normalize: Annotated[bool | None, typer.Option(help="embed: scale vectors to length 1.")] = None,
    dimensions: Annotated[int, typer.Option(min=0, help="embed: keep so many dimensions; 0 keeps all.")] = 0,
    top_k: Annotated[int, typer.Option(min=0, help="classify, rerank: keep the best; 0 keeps all.")] = 0,
    min_score: Annotated[float, typer.Option(min=0, max=1, help="entities: leave out those that score lower.")] = 0,
    raw_scores: Annotated[bool, typer.Option("--raw-scores", help="rerank: the model's raw scores.")] = False,
    truncation: TruncationOption = "right",
    window_stride: WindowOption = None,
    request_tokens: Annotated[int, typer.Option(min=1, help="About how many tokens a request has.")] = 2048,
    max_requests: Annotated[int, typer.Option(min=1, help="Most requests under way; fewer when refused.")] = 32,
    timeout: Annotated[float, typer.Option(metavar="SECONDS", min=0.001, help="Longest wait for one answer.")] = 120,
    patience: Annotated[
        float, typer.Option(metavar="SECONDS", min=0, help="Give up when nothing is answered for so long.")
    ] = 300,
    inference: InferenceOption = None,
    as_json: JsonOption = False,
) -> None:
    """
    Send the rows of files through a model. A run that was killed goes on with --resume, without loss or repeat.

    The output has a row for each row that was answered, in order, with its number in the input; the others are in
    OUTPUT.errors.jsonl with the reason. It appears when it is whole. OUTPUT.run.json says what was done.

    Example: modelfleet batch embed --model minilm --input 'in/*.jsonl.gz' --output vectors.parquet --keep id --resume
    """
    # What reads and writes files costs a third of a second to import, which other commands need not pay.
    from modelfleet_tools.batch.run import Settings, run  # noqa: PLC0415
    from modelfleet_tools.batch.sharding import Shard  # noqa: PLC0415
    from modelfleet_tools.batch.tasks import Columns, Options  # noqa: PLC0415

    if resume and overwrite:
        raise typer.BadParameter("Give --resume or --overwrite, not both.")
    settings = Settings(
        task=task,
        model=model,
        input=source,
        output=output,
        columns=Columns(text_column, query_column, documents_column, tuple(keep or ())),
        options=Options(normalize, dimensions, top_k, min_score, raw_scores, truncation, window_stride),
        shard=Shard.parse(shard) if shard else Shard(),
        work_dir=work_dir,
        resume=resume,
        overwrite=overwrite,
        request_tokens=request_tokens,
        requests=max_requests,
        timeout_s=timeout,
        patience_s=patience,
    )

    async def work() -> "Summary":
        async with AsyncClient(inference=inference, timeout_s=timeout, tries_when_full=1) as client:
            return await run(client, settings)

    try:
        with _terminated_like_interrupted():
            summary = asyncio.run(work())
    except KeyboardInterrupt:
        tell("Every whole chunk of rows is kept. Go on with --resume.")
        raise
    _print(summary, as_json=as_json)
    if summary.failed:
        raise typer.Exit(ExitCode.SOME_FAILED if summary.done else ExitCode.ALL_FAILED)


@contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    """Let SIGTERM, which ends pods, stop a run as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _print(summary: "Summary", *, as_json: bool) -> None:
    if as_json:
        print_json(summary)
        return
    rows = [
        ("rows", f"{summary.rows:,}"),
        ("done", f"{summary.done:,}"),
        ("failed", f"{summary.failed:,}" + (f", see {summary.errors}" if summary.errors else "")),
        ("tokens", f"{summary.tokens:,}"),
        ("texts cut", f"{summary.truncated:,}"),
        ("seconds", f"{summary.seconds:,.1f}"),
        ("rows/s", f"{summary.rows_per_s:,.1f}"),
        ("tokens/s", f"{summary.tokens_per_s:,.1f}"),
        ("retries", f"{summary.retries:,}"),
        ("most requests at once", str(summary.most_requests)),
    ]
    print_table(f"{summary.output}, by {summary.model}", ("", ""), rows)
