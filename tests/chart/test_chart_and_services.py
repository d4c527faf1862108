"""What the chart says to the services and expects of them is what they know."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness.chart import CHART, render, render_file
from modelfleet.inference import metrics as inference_metrics
from modelfleet.inference.__main__ import Settings as InferenceSettings
from modelfleet.inference.generation import metrics as generation_metrics
from modelfleet.manager import metrics as manager_metrics
from modelfleet.manager.__main__ import Settings as ManagerSettings
from modelfleet.manager.store.database import Database
from modelfleet.manager.workers import Workers
from modelfleet.runtime import server, telemetry
from modelfleet.runtime.settings import ServerSettings
from modelfleet.tokenizer import metrics as tokenizer_metrics
from modelfleet.tokenizer.__main__ import Settings as TokenizerSettings
from prometheus_client.metrics import MetricWrapperBase

# What Kubernetes puts in from a Secret.
FROM_ELSEWHERE = {"MODELFLEET_DATABASE_URL": "postgresql+psycopg://user:password@host/name"}
SETTINGS: dict[str, type[ServerSettings]] = {
    "tokenizer": TokenizerSettings,
    "pool-default": InferenceSettings,
    "manager": ManagerSettings,
}


@pytest.mark.parametrize(("name", "settings"), SETTINGS.items())
@pytest.mark.parametrize("file", [None, CHART / "examples" / "production.yaml"], ids=["default", "production"])
def test_every_variable_is_a_setting_and_is_taken(
    file: Path | None, name: str, settings: type[ServerSettings], monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = render_file(file).environment(name)
    for variable, value in environment.items():
        if variable.startswith("MODELFLEET_"):
            assert variable.removeprefix("MODELFLEET_").lower() in settings.model_fields, variable
            monkeypatch.setenv(variable, value if isinstance(value, str) else FROM_ELSEWHERE.get(variable, "a-name"))

    settings()


@pytest.mark.parametrize(("name", "settings"), SETTINGS.items())
def test_ports_are_those_that_the_service_listens_on(name: str, settings: type[ServerSettings]) -> None:
    ports = {port["name"]: port["containerPort"] for port in render().container(name)["ports"]}

    assert ports == {
        "grpc": settings.model_fields["port"].default,
        "metrics": settings.model_fields["metrics_port"].default,
    }


def test_the_liveness_probe_asks_for_a_health_service_that_there_is() -> None:
    assert render().container("manager")["livenessProbe"]["grpc"]["service"] == server.LIVENESS


def queried() -> Iterator[str]:
    rendered = render_file(CHART / "examples" / "production.yaml")
    for panel in json.loads(rendered.one("ConfigMap", "dashboard")["data"]["modelfleet.json"])["panels"]:
        yield from (target["expr"] for target in panel["targets"])
    for group in rendered.one("PrometheusRule", "")["spec"]["groups"]:
        yield from (rule["expr"] for rule in group["rules"])
    pools = render_file(CHART / "examples" / "gpu-pools.yaml")
    yield from (
        trigger["metadata"]["query"] for one in pools.of("ScaledObject").values() for trigger in one["spec"]["triggers"]
    )


def known_labels(tmp_path: Path) -> dict[str, set[str]]:
    """The labels of each metric that a service exports, by its name without a suffix."""
    modules = (telemetry, inference_metrics, generation_metrics, tokenizer_metrics, manager_metrics)
    collectors = [
        found for module in modules for found in vars(module).values() if isinstance(found, MetricWrapperBase)
    ]
    labels = {str(one._name): set(one._labelnames) for one in collectors}  # noqa: SLF001  there is no other way to them
    database = Database(f"sqlite:///{tmp_path / 'manager.db'}")
    database.migrate()
    for family in manager_metrics.ManagerCollector(database, Workers(database, 60)).collect():
        labels[family.name] = set(getattr(family, "_labelnames", ()))
    database.close()
    return labels


# What Prometheus adds: of targets, by the monitor, and of buckets.
ADDED = {"namespace", "job", "app_kubernetes_io_instance", "modelfleet_dev_pool", "le"}


def test_every_metric_and_label_that_is_asked_for_is_one_that_a_service_exports(tmp_path: Path) -> None:
    known = known_labels(tmp_path)
    asked = set()
    for query in queried():
        names = {re.sub(r"_(bucket|sum|count|total)$", "", name) for name in re.findall(r"\b(modelfleet_\w+)\{", query)}
        assert names, query
        asked |= names
        grouped = {label.strip() for group in re.findall(r"by \(([^)]*)\)", query) for label in group.split(",")}
        matched = set(re.findall(r"[{,]\s*(\w+)(?:=~|!~|!=|=)", query))
        for name in names:
            assert name in known, query
            assert grouped | matched <= known[name] | ADDED, (query, name)

    assert len(asked) > 8


def test_what_every_manager_tells_alike_is_not_added_up() -> None:
    queries = [query for query in queried() if "modelfleet_manager_" in query]

    assert queries
    assert not [query for query in queries if "sum" in query]
