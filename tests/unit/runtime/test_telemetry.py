import asyncio
import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import structlog
from modelfleet.runtime import telemetry


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers, root.level
    yield
    root.handlers = handlers
    root.setLevel(level)
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()


def logged(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().err.splitlines()]


def test_events_are_json_lines_with_service_level_and_time(capsys: pytest.CaptureFixture[str]) -> None:
    telemetry.configure_logging("made-up", "info")

    structlog.get_logger().info("loaded", digest="abc")

    [event] = logged(capsys)
    assert event.pop("timestamp")
    assert event == {"event": "loaded", "digest": "abc", "service": "made-up", "level": "info"}


def test_less_severe_events_are_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    telemetry.configure_logging("made-up", "info")

    structlog.get_logger().debug("detail")

    assert logged(capsys) == []


def test_records_of_other_libraries_look_alike(capsys: pytest.CaptureFixture[str]) -> None:
    telemetry.configure_logging("made-up", "info")

    logging.getLogger("library").warning("careful %s", "now")

    [event] = logged(capsys)
    assert (event["event"], event["level"], event["service"]) == ("careful now", "warning", "made-up")


async def test_the_request_id_is_that_of_the_task_that_logs(capsys: pytest.CaptureFixture[str]) -> None:
    telemetry.configure_logging("made-up", "info")

    async def handle(request_id: str) -> None:
        telemetry.request_id.set(request_id)
        await asyncio.sleep(0)
        structlog.get_logger().info("handled", handled=request_id)

    async with asyncio.TaskGroup() as tasks:
        for number in range(3):
            tasks.create_task(handle(f"id-{number}"))

    assert [event["request_id"] == event["handled"] for event in logged(capsys)] == [True] * 3


def test_an_exception_is_logged_in_one_line_without_the_values_of_variables(
    capsys: pytest.CaptureFixture[str],
) -> None:
    telemetry.configure_logging("made-up", "info")

    def fail(text: str) -> None:
        raise ValueError(f"{len(text)} characters are too many")

    try:
        fail("a user's secret")
    except ValueError as error:
        structlog.get_logger().error("failed", exc_info=error)

    [event] = logged(capsys)
    [exception] = event["exception"]
    assert exception["exc_value"] == "15 characters are too many"
    assert exception["frames"][-1]["name"] == "fail"
    assert "secret" not in json.dumps(event)
