import inspect

import pytest
from modelfleet.client import AsyncClient, Client
from modelfleet.client.targets import targets

METHODS = sorted(name for name, value in vars(Client).items() if not name.startswith("_") and callable(value))


def test_both_clients_have_the_same_methods_with_the_same_parameters() -> None:
    for name in METHODS:
        assert inspect.signature(getattr(Client, name)) == inspect.signature(getattr(AsyncClient, name)), name
        assert inspect.getdoc(getattr(Client, name)), name


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"close"}))
def test_every_call_has_a_deadline_that_the_caller_may_set(name: str) -> None:
    timeout = inspect.signature(getattr(Client, name)).parameters["timeout_s"]

    assert timeout.kind is inspect.Parameter.KEYWORD_ONLY


def test_help_shows_the_parameters_of_a_call() -> None:
    assert list(inspect.signature(Client.embed).parameters)[:3] == ["self", "model", "texts"]
    assert Client.embed.__name__ == "embed"


def test_a_given_target_wins_over_the_environment_and_that_over_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELFLEET_INFERENCE", "from-environment:1")
    monkeypatch.setenv("MODELFLEET_TOKENIZER", "from-environment:2")
    monkeypatch.delenv("MODELFLEET_MANAGER", raising=False)

    found = targets(inference="given:1", tokenizer=None, manager=None)

    assert list(found.values()) == ["given:1", "from-environment:2", "localhost:8003"]
