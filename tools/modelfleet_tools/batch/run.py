"""One run: rows are read, sent, answered and staged, in order, until the output can be put in its place."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from modelfleet.bundle.reference import ModelReference
from modelfleet.client import AsyncClient
from modelfleet.client.answers import ServedModel
from modelfleet.runtime.errors import InvalidInputError, NotServedHereError, WrongTaskError

from modelfleet_tools.batch.checkpoint import Checkpoint, Job, RunState
from modelfleet_tools.batch.concurrency import AdaptiveConcurrency
from modelfleet_tools.batch.filling import MAX_ROWS, Failed, Row, TokenEstimate, fill
from modelfleet_tools.batch.formats import encoder
from modelfleet_tools.batch.progress import Meter, Summary, shown
from modelfleet_tools.batch.rows import Found, RowError, RowReader
from modelfleet_tools.batch.sending import Answered, Outcome, Sender, in_order
from modelfleet_tools.batch.sharding import Shard
from modelfleet_tools.batch.sources import find_sources, fingerprint, kind_of, locate, names
from modelfleet_tools.batch.staging import Places, Staging, begin, disk_errors, locked
from modelfleet_tools.batch.tasks import TEXT_TASKS, Columns, Options, asker, output_schema, read_inputs
from modelfleet_tools.named_version import named_version

# A chunk ends after so many rows of the input whatever comes of them, so that a run that was killed cuts its output as
# an unbroken one does.
CHUNK_ROWS = 1000
# What is read at once.
_BLOCK_ROWS = 256
_BLOCK_CHARACTERS = 1 << 20


@dataclass(frozen=True, slots=True)
class Settings:
    """What to do, and how hard. `request_tokens` is per request, `requests` at most under way at once."""

    task: str
    model: str
    input: str
    output: str
    columns: Columns
    options: Options
    shard: Shard = field(default_factory=Shard)
    work_dir: Path | None = None
    resume: bool = False
    overwrite: bool = False
    request_tokens: int = 2048
    requests: int = 32
    timeout_s: float = 120.0
    patience_s: float = 300.0


async def run(client: AsyncClient, settings: Settings) -> Summary:
    """
    Do the job, or go on with it. Returns when the output is in its place.

    Raises InvalidInputError for what cannot be read, StateConflictError for an output that is there, UnavailableError
    and others when the service does not answer; what was staged is kept then.
    """
    output = settings.shard.path(settings.output)
    places = Places.of(locate(output), settings.work_dir)
    columns = settings.columns
    if names(settings.input, places.output):
        raise InvalidInputError(f"{output} is one of the inputs {settings.input}. Write to another --output.")
    sources = await asyncio.to_thread(find_sources, settings.input)
    reader = RowReader(sources, columns.needed(settings.task))
    schema = output_schema(settings.task, await asyncio.to_thread(reader.kept_types, columns.kept))
    if len(set(schema.names)) < len(schema.names):
        taken = sorted(set(schema.names) & set(columns.kept))
        raise InvalidInputError(f"The output has a column {taken[0]!r} of its own. Rename it in the input, or drop it.")
    print_of_input = await asyncio.to_thread(fingerprint, sources)
    job = Job(
        settings.task,
        str(ModelReference.parse(settings.model)),
        print_of_input.files,
        print_of_input.size,
        print_of_input.digest,
        {**asdict(columns), "kept": list(columns.kept)},
        asdict(settings.options),
        str(settings.shard),
        places.output.path if places.output.is_local else output,
    )
    encode = encoder(*kind_of(places.output.name), schema)
    with disk_errors(), locked(places):
        checkpoint = begin(places, job, "", resume=settings.resume, overwrite=settings.overwrite)
        staging = Staging(places, encode, checkpoint)
        if checkpoint.state is not RunState.RUNNING:
            if checkpoint.state is RunState.SEALING:
                await asyncio.to_thread(staging.seal)
            return _summary(staging.checkpoint, Meter(checkpoint, lambda: 1.0), 0, 0)
        served = await _served(client, checkpoint, settings.model)
        if served.task != settings.task:
            raise WrongTaskError(
                f"{served.model}@{served.model_version} is a model of the task {served.task!r}, not {settings.task!r}."
            )
        staging.checkpoint = replace(checkpoint, served=f"{served.model}@{served.model_version}")
        return await _stage(client, settings, reader, staging)


async def _served(client: AsyncClient, begun: Checkpoint, model: str) -> ServedModel:
    try:
        return await named_version(client, begun.served or model)
    except NotServedHereError as error:
        if not begun.served:
            raise
        raise NotServedHereError(
            f"{error.message} The run was begun with that version: serve it again, or begin anew with --overwrite."
        ) from error


async def _stage(client: AsyncClient, settings: Settings, reader: RowReader, staging: Staging) -> Summary:
    begun = staging.checkpoint
    meter = Meter(begun, lambda: reader.fraction)
    concurrency = AdaptiveConcurrency(settings.requests)
    estimate = TokenEstimate()
    ask = asker(client, settings.task, begun.served, settings.options, settings.timeout_s)
    sender = Sender(ask, concurrency, estimate, settings.patience_s)
    rows_at_once = MAX_ROWS if settings.task in TEXT_TASKS else 1
    portions = fill(_blocks(reader, settings, begun.rows, meter), estimate, settings.request_tokens, rows_at_once)
    chunk: list[Outcome] = []
    with shown(meter) as show:
        async for outcomes in in_order(portions, sender.send):
            for outcome in outcomes:
                chunk.append(outcome)
                if len(chunk) == CHUNK_ROWS:
                    await asyncio.to_thread(_append, staging, chunk, begun, meter)
                    chunk = []
                    show(staging.checkpoint)
        if not reader.found:
            raise InvalidInputError(f"{settings.input} holds no rows.")
        if chunk or not staging.checkpoint.rows:
            await asyncio.to_thread(_append, staging, chunk, begun, meter)
        show(staging.checkpoint)
    await asyncio.to_thread(staging.seal)
    return _summary(staging.checkpoint, meter, sender.retries, concurrency.highest)


async def _blocks(reader: RowReader, settings: Settings, start: int, meter: Meter) -> AsyncIterator[list[Row | Failed]]:
    """Yield the rows of this shard from `start` on; files are read in a thread."""
    own = (found for found in reader if found.number >= start and settings.shard.has(found.number))
    parsed: Iterator[Row | Failed] = (_parse(found, settings.task, settings.columns) for found in own)
    while block := await asyncio.to_thread(_take, parsed):
        meter.taken += len(block)
        yield block


def _take(rows: Iterator[Row | Failed]) -> list[Row | Failed]:
    block: list[Row | Failed] = []
    characters = 0
    while characters < _BLOCK_CHARACTERS and len(block) < _BLOCK_ROWS and (row := next(rows, None)):
        block.append(row)
        characters += row.inputs.characters if isinstance(row, Row) else 0
    return block


def _parse(found: Found, task: str, columns: Columns) -> Row | Failed:
    try:
        values = found.parse()
        inputs = read_inputs(task, values, columns)
    except RowError as error:
        return Failed(found.number, found.place, "INVALID_INPUT", str(error))
    return Row(found.number, found.place, inputs, {column: values.get(column) for column in columns.kept})


def _append(staging: Staging, chunk: list[Outcome], begun: Checkpoint, meter: Meter) -> None:
    """Stage a chunk; runs in a thread."""
    records: list[dict[str, object]] = []
    failures: list[dict[str, object]] = []
    tokens = truncated = 0
    last = -1
    for outcome in chunk:
        if isinstance(outcome, Answered):
            result = outcome.result
            usage = {"tokens": result.tokens, "truncated": result.truncated}
            records.append({"row": outcome.number, **outcome.kept, **result.values, **usage})
            tokens += result.tokens
            truncated += result.truncated
        else:
            failures.append(
                {
                    "row": outcome.number,
                    "place": outcome.place,
                    "reason": outcome.reason,
                    "message": outcome.message,
                }
            )
        last = outcome.number
    before = staging.checkpoint
    after = replace(
        before,
        rows=last + 1,
        done=before.done + len(records),
        failed=before.failed + len(failures),
        tokens=before.tokens + tokens,
        truncated=before.truncated + truncated,
        seconds=begun.seconds + meter.seconds,
    )
    staging.append(records, failures, first=not before.rows, after=after)


def _summary(end: Checkpoint, meter: Meter, retries: int, most_requests: int) -> Summary:
    rows_per_s, tokens_per_s = meter.rates(end)
    return Summary(
        model=end.served,
        rows=end.done + end.failed,
        done=end.done,
        failed=end.failed,
        tokens=end.tokens,
        truncated=end.truncated,
        seconds=round(end.seconds, 3),
        rows_per_s=round(rows_per_s, 1),
        tokens_per_s=round(tokens_per_s, 1),
        retries=retries,
        most_requests=most_requests,
        output=end.job.output,
        errors=f"{end.job.output}.errors.jsonl" if end.failed else None,
    )
