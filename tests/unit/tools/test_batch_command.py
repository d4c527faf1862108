"""`modelfleet batch` in this process, against a small real service."""

import asyncio
import csv
import gzip
import io
import json
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import structlog
from harness.letters import Letters, probability, served, serving_letters
from modelfleet.api.inference.v1 import inference_pb2 as pb
from modelfleet.runtime.errors import DrainingError, InvalidInputError, OverloadedError, SessionFailureError
from modelfleet_tools.__main__ import app
from modelfleet_tools.batch import zstd
from typer.testing import CliRunner, Result

TEXTS = [f"text {'x' * (number % 7)}" for number in range(2500)]


async def run(*arguments: object) -> Result:
    return await asyncio.to_thread(CliRunner().invoke, app, ["batch", *map(str, arguments)])


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    structlog.configure(logger_factory=structlog.ReturnLoggerFactory())
    yield
    structlog.reset_defaults()


@pytest.fixture
def letters() -> Letters:
    return Letters(served=[served("letters", 1, aliases=["stable"])])


@pytest.fixture
async def batch(letters: Letters, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Callable[..., Any]]:
    """Run `batch TASK` with further arguments, on the model `letters`."""
    async with serving_letters(letters) as targets:
        monkeypatch.setenv("MODELFLEET_INFERENCE", targets["inference"])

        async def call(task: str, source: object, output: object, *more: object) -> Result:
            letters.served[0].task = getattr(pb, f"TASK_{task.upper()}")
            return await run(task, "--model", "letters", "--input", source, "--output", output, *more)

        yield call


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_jsonl(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def vectors(texts: list[str]) -> list[dict[str, Any]]:
    return [
        {"row": row, "vector": [len(text), 1.0], "tokens": len(text), "truncated": False}
        for row, text in enumerate(texts)
    ]


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "in.jsonl", [{"text": text} for text in TEXTS])


async def test_every_row_is_answered_in_order(batch: Any, texts: Path, tmp_path: Path) -> None:
    shown = await batch("embed", texts, tmp_path / "out.jsonl", "--json")

    assert shown.exit_code == 0, shown.stderr
    assert read_jsonl(tmp_path / "out.jsonl") == vectors(TEXTS)
    summary = json.loads(shown.stdout)
    assert (summary["model"], summary["rows"], summary["done"], summary["failed"]) == ("letters@1", 2500, 2500, 0)
    assert summary["tokens"] == sum(map(len, TEXTS))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl", "out.jsonl.run.json"]


@pytest.mark.parametrize("ending", ["csv", "csv.gz", "csv.zst", "jsonl.gz", "jsonl.zst", "parquet"])
async def test_every_format_is_read_and_written(batch: Any, tmp_path: Path, ending: str) -> None:
    source, output = tmp_path / f"in.{ending}", tmp_path / f"out.{ending}"
    ids = [f"id {row}" for row in range(len(TEXTS))]
    if ending == "parquet":
        pq.write_table(pa.table({"id": list(range(len(TEXTS))), "text": TEXTS, "other": TEXTS}), source)
    else:
        text = io.StringIO(newline="")
        if ending.startswith("csv"):
            csv.writer(text).writerows([("id", "text"), *zip(ids, TEXTS, strict=True)])
        else:
            text.writelines(json.dumps({"id": id_, "text": one}) + "\n" for id_, one in zip(ids, TEXTS, strict=True))
        data = text.getvalue().encode()
        source.write_bytes({"z": gzip.compress, "t": zstd.compress}.get(ending[-1], bytes)(data))
        if ending.endswith("gz"):
            source.write_bytes(gzip.compress(data))

    shown = await batch("embed", source, output, "--keep", "id")

    assert shown.exit_code == 0, shown.stderr
    if ending == "parquet":
        table = pq.read_table(output)
        assert table.schema.field("id").type == pa.int64()
        assert table.column("vector").to_pylist() == [[len(one), 1] for one in TEXTS]
        return
    content = output.read_bytes()
    if ending.endswith(("gz", "zst")):
        content = gzip.decompress(content) if ending.endswith("gz") else zstd.ZstdFile(io.BytesIO(content)).read()
    rows = (
        list(csv.DictReader(io.StringIO(content.decode())))
        if ending.startswith("csv")
        else [json.loads(line) for line in content.splitlines()]
    )
    assert [row["id"] for row in rows] == ids
    assert [row["vector"] for row in rows][:2] in ([[5.0, 1.0], [6.0, 1.0]], ["[5.0,1.0]", "[6.0,1.0]"])


@pytest.mark.parametrize(
    ("task", "row", "expected"),
    [
        (
            "classify",
            {"text": "abc"},
            {"label": "a", "score": 1.0, "labels": [{"label": "a", "score": 1.0}], "tokens": 3},
        ),
        (
            "entities",
            {"text": "abc"},
            {"entities": [{"label": "FIRST", "text": "a", "start": 0, "end": 1, "score": 0.5}], "tokens": 3},
        ),
        (
            "rerank",
            {"query": "q", "documents": ["a", "bbb"]},
            {
                "documents": [
                    {"index": 1, "score": pytest.approx(probability(3))},
                    {"index": 0, "score": pytest.approx(probability(1))},
                ],
                "tokens": 4,
            },
        ),
    ],
)
async def test_every_task_has_its_columns(
    batch: Any, tmp_path: Path, task: str, row: dict[str, Any], expected: dict[str, Any]
) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", [row, row])

    shown = await batch(task, source, tmp_path / "out.jsonl")
    parquet = await batch(task, source, tmp_path / "out.parquet")

    assert (shown.exit_code, parquet.exit_code) == (0, 0), shown.stderr + parquet.stderr
    assert read_jsonl(tmp_path / "out.jsonl")[1] == {"row": 1, **expected, "truncated": False}
    assert pq.read_table(tmp_path / "out.parquet").to_pylist()[1] == {"row": 1, **expected, "truncated": False}


async def test_a_pattern_takes_all_files_by_name(batch: Any, tmp_path: Path) -> None:
    for name, text in (("b", "two"), ("a", "o"), ("c", "three")):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"text": text}])

    shown = await batch("embed", tmp_path / "*.jsonl", tmp_path / "out.csv")

    assert shown.exit_code == 0
    assert [row["tokens"] for row in csv.DictReader(io.StringIO((tmp_path / "out.csv").read_text()))] == ["1", "3", "5"]


async def test_shards_have_every_row_once(
    batch: Any, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for index in range(3):
        monkeypatch.setenv("JOB_COMPLETION_INDEX", str(index))
        await batch("embed", texts, tmp_path / "out.jsonl", "--shard", "3" if index else "0/3")

    parts = [read_jsonl(tmp_path / f"out-0000{index}-of-00003.jsonl") for index in range(3)]
    assert [row["row"] for row in parts[1]] == list(range(1, len(TEXTS), 3))
    assert sorted((row for part in parts for row in part), key=lambda row: row["row"]) == vectors(TEXTS)


async def test_a_row_that_fails_for_good_is_told_of_and_the_rest_goes_on(
    batch: Any, letters: Letters, tmp_path: Path
) -> None:
    def refuse(request: Any) -> InvalidInputError | None:
        texts = list(getattr(request, "texts", []))
        return InvalidInputError("This text is bad.", field=f"texts[{texts.index('bad')}]") if "bad" in texts else None

    letters.fail = refuse
    unusable = ['{"text": "cc"', '{"text": 7}', "[]", '{"no": 1}', "", '{"text": ""}']
    lines = ['{"text": "a"}', '{"text": "bad"}', *unusable, '{"text": "d"}']
    (tmp_path / "in.jsonl").write_text("\n".join(lines))

    shown = await batch("embed", tmp_path / "in.jsonl", tmp_path / "out.jsonl")

    assert shown.exit_code == 5
    assert [row["row"] for row in read_jsonl(tmp_path / "out.jsonl")] == [0, 7]
    errors = read_jsonl(tmp_path / "out.jsonl.errors.jsonl")
    assert [error["row"] for error in errors] == [1, 2, 3, 4, 5, 6]
    assert errors[0] == {
        "row": 1, "place": "in.jsonl, line 2", "reason": "INVALID_INPUT", "message": "This text is bad."
    }  # fmt: skip
    said = ["no JSON", "type int, no text", "no object", "has no 'text'", "is empty"]
    for error, words in zip(errors[1:], said, strict=True):
        assert words in error["message"]


async def test_an_error_that_names_no_row_is_narrowed_down_to_it(
    batch: Any, letters: Letters, texts: Path, tmp_path: Path
) -> None:
    letters.fail = lambda request: (
        InvalidInputError("Some text is bad.") if TEXTS[0] in getattr(request, "texts", []) else None
    )
    write_jsonl(texts, [{"text": text} for text in [*TEXTS[1:7], TEXTS[0], *TEXTS[1:7]]])

    shown = await batch("embed", texts, tmp_path / "out.jsonl")

    assert shown.exit_code == 5
    assert len(read_jsonl(tmp_path / "out.jsonl")) == 12
    assert [error["row"] for error in read_jsonl(tmp_path / "out.jsonl.errors.jsonl")] == [6]


async def test_no_row_done_has_an_exit_code_of_its_own(batch: Any, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text("broken\n")

    assert (await batch("embed", tmp_path / "in.jsonl", tmp_path / "out.jsonl")).exit_code == 6


async def test_refusals_and_failures_are_tried_again(batch: Any, letters: Letters, texts: Path, tmp_path: Path) -> None:
    turns = iter([OverloadedError("full"), DrainingError("gone"), SessionFailureError("broken"), *[None] * 10_000])

    def fail(request: Any) -> Exception | None:
        return next(turns) if getattr(request, "texts", None) else None

    letters.fail = fail  # type: ignore[assignment]  # returns what the table has

    shown = await batch("embed", texts, tmp_path / "out.jsonl", "--json")

    assert shown.exit_code == 0
    assert json.loads(shown.stdout)["retries"] >= 2
    assert read_jsonl(tmp_path / "out.jsonl") == vectors(TEXTS)


async def test_a_service_that_answers_nothing_ends_the_run_which_can_be_resumed(
    batch: Any, letters: Letters, texts: Path, tmp_path: Path
) -> None:
    write_jsonl(texts, [{"text": text} for text in [*TEXTS[:1500], "x" * 30_000]])
    letters.fail = lambda request: (
        DrainingError("gone") if any(len(text) > 20_000 for text in getattr(request, "texts", [])) else None
    )

    stopped = await batch("embed", texts, tmp_path / "out.jsonl", "--patience", "0")
    letters.fail = lambda _: None
    letters.requests.clear()
    resumed = await batch("embed", texts, tmp_path / "out.jsonl", "--resume")

    assert stopped.exit_code == 3, stopped.stderr
    assert resumed.exit_code == 0
    assert len(read_jsonl(tmp_path / "out.jsonl")) == 1501
    assert sum(len(getattr(request, "texts", [])) for request in letters.requests) == 501


async def test_an_output_that_is_there_is_left_alone(batch: Any, texts: Path, tmp_path: Path) -> None:
    (tmp_path / "out.jsonl").write_text("mine")

    refused = await batch("embed", texts, tmp_path / "out.jsonl")
    also = await batch("embed", texts, tmp_path / "out.jsonl", "--resume")
    kept = (tmp_path / "out.jsonl").read_text()
    replaced = await batch("embed", texts, tmp_path / "out.jsonl", "--overwrite")

    assert (refused.exit_code, also.exit_code, replaced.exit_code) == (1, 1, 0)
    assert "is there already" in refused.stderr
    assert kept == "mine"
    assert len(read_jsonl(tmp_path / "out.jsonl")) == len(TEXTS)


@pytest.mark.parametrize("source", ["rows.jsonl", "*.jsonl"])
async def test_an_input_is_never_written_over(batch: Any, tmp_path: Path, source: str) -> None:
    output = write_jsonl(tmp_path / "rows.jsonl", [{"text": "mine"}])

    refused = await batch("embed", tmp_path / source, output, "--overwrite")

    assert (refused.exit_code, "is one of the inputs" in refused.stderr) == (1, True), refused.stderr
    assert read_jsonl(output) == [{"text": "mine"}]
    output.unlink()  # a pattern that will name it later, such as to the next shard, is as bad
    assert (await batch("embed", tmp_path / source, output)).exit_code == 1


async def test_a_place_that_cannot_be_written_is_one_sentence(batch: Any, texts: Path) -> None:
    refused = await batch("embed", texts, Path("/proc/out.jsonl"))

    assert (refused.exit_code, "The output cannot be written" in refused.stderr) == (1, True), refused.stderr
    assert isinstance(refused.exception, SystemExit)


async def test_a_byte_order_mark_belongs_to_no_row(batch: Any, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "first"}\n{"text": "second"}\n')

    assert (await batch("embed", tmp_path / "in.jsonl", tmp_path / "out.jsonl")).exit_code == 0


async def test_a_run_that_is_complete_is_not_done_again(
    batch: Any, letters: Letters, texts: Path, tmp_path: Path
) -> None:
    await batch("embed", texts, tmp_path / "out.jsonl")
    letters.requests.clear()

    again = await batch("embed", texts, tmp_path / "out.jsonl", "--resume", "--json")

    assert (again.exit_code, json.loads(again.stdout)["done"], letters.requests) == (0, 2500, [])


async def test_a_checkpoint_of_another_job_is_refused(batch: Any, texts: Path, tmp_path: Path) -> None:
    await batch("embed", texts, tmp_path / "out.jsonl")

    options = await batch("embed", texts, tmp_path / "out.jsonl", "--resume", "--dimensions", "1")
    write_jsonl(texts, [{"text": "another"}])
    other = await batch("embed", texts, tmp_path / "out.jsonl", "--resume")

    assert (other.exit_code, options.exit_code) == (1, 1)
    assert "another input" in other.stderr
    assert "options" in options.stderr


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("in.csv", b"id,body\n1,a\n", "has no column 'text'. It has 'id', 'body'"),
        ("in.jsonl", b"", "holds no rows"),
        ("in.csv", b"", "holds no rows"),
        ("in.csv", b"text\n", "holds no rows"),
        ("in.txt", b"a", "no known format"),
    ],
)
async def test_what_cannot_be_an_input_is_refused(
    batch: Any, tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)

    shown = await batch("embed", tmp_path / name, tmp_path / "out.jsonl")

    assert shown.exit_code == 1
    assert message in shown.stderr
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize("ending", ["csv.gz", "csv.zst", "parquet"])
async def test_a_damaged_file_loses_its_own_rest_and_no_more(batch: Any, tmp_path: Path, ending: str) -> None:
    rows = [f"{number * 7919 % 100_003:b}" for number in range(10_000)]
    text = ("text\n" + "\n".join(rows)).encode()
    if ending == "parquet":
        pq.write_table(pa.table({"text": rows}), tmp_path / "a.parquet")
        whole = (tmp_path / "a.parquet").read_bytes()
    else:
        whole = gzip.compress(text) if ending.endswith("gz") else zstd.compress(text)
    (tmp_path / f"a.{ending}").write_bytes(whole[:-1000])
    write_jsonl(tmp_path / "b.jsonl", [{"text": "after"}])

    shown = await batch("embed", tmp_path / "[ab].*", tmp_path / "out.jsonl", "--max-requests", "4")

    assert shown.exit_code == 5
    (error,) = read_jsonl(tmp_path / "out.jsonl.errors.jsonl")
    assert error["place"] == f"a.{ending}"
    assert "damaged" in error["message"]
    done = read_jsonl(tmp_path / "out.jsonl")
    assert done[-1]["tokens"] == 5
    assert [row["tokens"] for row in done[:-1]] == [len(row) for row in rows[: len(done) - 1]]


async def test_broken_csv_rows_fail_alone(batch: Any, tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_bytes(b'text,n\n"a\nb",1\nc\n\xff,2\nd,3\n"open,4\n')

    shown = await batch("embed", tmp_path / "in.csv", tmp_path / "out.jsonl")

    assert shown.exit_code == 5
    assert [row["tokens"] for row in read_jsonl(tmp_path / "out.jsonl")] == [3, 1]
    messages = [error["message"] for error in read_jsonl(tmp_path / "out.jsonl.errors.jsonl")]
    assert [words in message for words, message in zip(["1 cells", "UTF-8", "no CSV"], messages, strict=True)] == [
        True
    ] * 3


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--resume", "--overwrite"], 2, "not both"),
        (["--shard", "3/3"], 1, "no shard"),
        (["--keep", "tokens"], 1, "'tokens' of its own"),
        (["--model", "absent"], 4, "not served"),
    ],
)
async def test_wrong_usage_says_what_is_wrong(
    batch: Any, texts: Path, arguments: list[str], code: int, message: str
) -> None:
    shown = await batch("embed", texts, texts.with_name("out.jsonl"), *arguments)

    assert shown.exit_code == code
    assert message in shown.stderr
