"""The chart, rendered by Helm's own engine."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import helm_python
import yaml

CHART = Path(__file__).parents[2] / "deploy" / "helm" / "modelfleet"
VALUES_FILES = (None, CHART / "values-cpu.yaml", *sorted((CHART / "examples").glob("*.yaml")))
RELEASE, NAMESPACE = "demo", "ml"

Object = Mapping[str, Any]


@dataclass(frozen=True)
class Manifests:
    """What a release would put into the cluster, hooks included, and its NOTES."""

    objects: tuple[Object, ...]
    notes: str

    def of(self, kind: str) -> dict[str, Object]:
        """Return the objects of a kind by name."""
        return {found["metadata"]["name"]: found for found in self.objects if found["kind"] == kind}

    def one(self, kind: str, name: str) -> Object:
        """Return the object of a kind whose name, behind the release's, is `name`."""
        return self.of(kind)[f"{RELEASE}-modelfleet-{name}" if name else f"{RELEASE}-modelfleet"]

    def pods(self) -> Iterator[tuple[str, Object]]:
        """Yield the name and the spec of each pod: of Deployments and Jobs, from their template."""
        for found in self.objects:
            if found["kind"] == "Pod":
                yield f"Pod {found['metadata']['name']}", found["spec"]
            if found["kind"] in ("Deployment", "Job"):
                yield f"{found['kind']} {found['metadata']['name']}", found["spec"]["template"]["spec"]

    def container(self, name: str) -> Object:
        """Return the container of a Deployment."""
        return self.one("Deployment", name)["spec"]["template"]["spec"]["containers"][0]

    def environment(self, name: str) -> dict[str, Any]:
        """Return the environment of a Deployment's container; values from elsewhere as their source."""
        return {one["name"]: one.get("value", one.get("valueFrom")) for one in self.container(name)["env"]}


def render(values: Mapping[str, Any] | None = None, *, release: str = RELEASE) -> Manifests:
    """Render the chart with some values. Raises helm_python.HelmError with the sentence of a failed check."""
    return _render(json.dumps(values or {}, sort_keys=True), release)


def render_file(path: Path | None) -> Manifests:
    """Render the chart with a file of values."""
    return render(helm_python.values_from_yaml(path.read_text()) if path else {})


@cache
def _chart() -> helm_python.Chart:
    return helm_python.Chart.load(CHART)


@cache
def _render(values: str, release: str) -> Manifests:
    given = json.loads(values)
    _chart().validate_schema(given)
    rendered = _chart().render(given, name=release, namespace=NAMESPACE)
    notes = next(text for path, text in rendered.items() if path.endswith("NOTES.txt"))
    documents = (
        document
        for path, text in sorted(rendered.items())
        if path.endswith(".yaml")
        for document in yaml.safe_load_all(text)
    )
    return Manifests(tuple(document for document in documents if document), notes)
