from typing import Literal

import pytest
from modelfleet.runtime.settings import ServerSettings, read_settings
from pydantic import ValidationError


class Settings(ServerSettings):
    """Settings of a made-up service."""

    port: int = 1234
    """Port."""
    mode: Literal["fast", "exact"] = "fast"
    """How it works."""


def read(*arguments: str) -> Settings:
    return read_settings(Settings, "service", "What it does.", arguments=list(arguments))


def test_flags_win_over_the_environment_and_that_over_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELFLEET_PORT", "2000")
    monkeypatch.setenv("MODELFLEET_MAX_CONCURRENT_CALLS", "7")

    settings = read("--port", "3000")

    assert (settings.port, settings.max_concurrent_calls, settings.mode) == (3000, 7, "fast")


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        read().port = 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--port=http"], "--port (or MODELFLEET_PORT) is 'http': Input should be a valid integer"),
        (["--max-concurrent-calls=0"], "--max-concurrent-calls (or MODELFLEET_MAX_CONCURRENT_CALLS) is '0'"),
        (["--mode=slow"], "--mode (or MODELFLEET_MODE) is 'slow': Input should be 'fast' or 'exact'"),
        (["--unknown=1"], "unrecognized arguments: --unknown=1"),
    ],
)
def test_a_wrong_value_is_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        read(*arguments)

    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_a_wrong_value_in_the_environment_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MODELFLEET_MODE", "slow")

    with pytest.raises(SystemExit):
        read()

    assert "--mode (or MODELFLEET_MODE) is 'slow': Input should be 'fast' or 'exact'" in capsys.readouterr().err


def test_help_tells_of_every_setting_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        read("--help")

    shown = " ".join(capsys.readouterr().out.split())
    assert stopped.value.code == 0
    assert "What it does." in shown
    for name in Settings.model_fields:
        assert f"--{name.replace('_', '-')}" in shown
    assert "How it works. (default: fast)" in shown
    assert "MODELFLEET_LOG_LEVEL" in shown
