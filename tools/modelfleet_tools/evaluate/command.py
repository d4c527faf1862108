"""`modelfleet evaluate`."""

import asyncio
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from modelfleet.client import AsyncClient
from modelfleet.runtime.errors import InvalidInputError, StateConflictError

from modelfleet_tools.extras import needs_extra
from modelfleet_tools.options import InferenceOption, JsonOption
from modelfleet_tools.output import print_json, print_table, tell
from modelfleet_tools.requests import ModelArgument, TruncationOption, WindowOption

if TYPE_CHECKING:
    from modelfleet_tools.evaluate.run import Found


def evaluate(
    model: ModelArgument,
    *,
    data: Annotated[str, typer.Option("--data", metavar="FILE", help="Labelled JSONL, CSV or Parquet, or a pattern.")],
    compare: Annotated[str | None, typer.Option(metavar="MODEL", help="Another model, to test the difference.")] = None,
    text_column: Annotated[str, typer.Option(help="The texts' column.")] = "text",
    query_column: Annotated[str, typer.Option(help="rerank: the queries' column.")] = "query",
    documents_column: Annotated[str, typer.Option(help="rerank: the column of lists of texts.")] = "documents",
    label_column: Annotated[
        str | None, typer.Option(help="What is right [label; for entities `entities`, for rerank `relevance`].")
    ] = None,
    rename: Annotated[
        list[str] | None, typer.Option(metavar="DATA=MODEL", help="A label of the data, as the model calls it.")
    ] = None,
    limit: Annotated[int, typer.Option(min=0, help="Take so many examples; 0 takes all.")] = 0,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write PATH.json and PATH.html [evaluation-MODEL].")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace them.")] = False,
    predictions: Annotated[
        Path | None, typer.Option(dir_okay=False, help="Also write what was answered to each example, as JSONL.")
    ] = None,
    texts_per_request: Annotated[int, typer.Option(min=1, max=256, help="Examples in a request.")] = 16,
    callers: Annotated[int, typer.Option(min=1, help="Requests under way at once.")] = 4,
    truncation: TruncationOption = "right",
    window_stride: WindowOption = None,
    timeout: Annotated[float, typer.Option(metavar="SECONDS", min=0.001, help="Longest wait for one answer.")] = 120,
    inference: InferenceOption = None,
    as_json: JsonOption = False,
) -> None:
    """
    Measure a served classify, entities or rerank model on labelled data; with --compare, beside another.

    Data for entities has `entities`, a list of objects with `start`, `end` and `label`, or `tokens` and their BIO
    `tags`; data for rerank has `relevance`, a gain for each document.

    Example: modelfleet evaluate injection --data test.csv --rename 1=INJECTION --rename 0=SAFE
    """
    with needs_extra("evaluate"):
        from modelfleet_tools.batch.tasks import Columns, Options  # noqa: PLC0415  with its extra only
        from modelfleet_tools.evaluate import report, run  # noqa: PLC0415
        from modelfleet_tools.evaluate.examples import Data  # noqa: PLC0415
    base = output or Path(f"evaluation-{model.replace('@', '-')}")
    places = [base.with_name(f"{base.name}.{ending}") for ending in ("json", "html")]
    for place in (*places, *([predictions] if predictions else [])):
        if place.exists() and not overwrite:
            raise StateConflictError(
                f"{place} is there already. Replace it with --overwrite, or choose another --output."
            )
    settings = run.Settings(
        models=(model, compare) if compare else (model,),
        data=Data(
            data, Columns(text_column, query_column, documents_column), label_column or "", _renamed(rename), limit
        ),
        options=Options(truncation=truncation, window_stride=window_stride),
        callers=callers,
        texts_per_request=texts_per_request,
        timeout_s=timeout,
    )

    async def work() -> "Found":
        async with AsyncClient(inference=inference, timeout_s=timeout) as client:
            return await run.evaluate(client, settings)

    found = asyncio.run(work())
    evaluation = found.evaluation
    document = report.as_json(evaluation)
    places[0].write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n")
    places[1].write_text(report.as_html(evaluation))
    if predictions:
        predictions.write_bytes(run.predictions(found))
    if as_json:
        print_json(document)
    else:
        for table in report.tables(evaluation):
            print_table(table.title, table.columns, table.rows)
    tell(f"Written: {places[0]}, {places[1]}" + (f", {predictions}" if predictions else ""))


def _renamed(pairs: list[str] | None) -> dict[str, str]:
    for pair in pairs or ():
        if "=" not in pair:
            raise InvalidInputError(f"--rename {pair!r} is not DATA=MODEL.")
    return dict(pair.split("=", 1) for pair in pairs or ())
