"""Registers the models that MODELFLEET_INITIAL_MODELS names: what the chart's Job runs after an install or upgrade."""

import json
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from modelfleet.client.client import Client
from modelfleet.client.steps import Service
from modelfleet.client.targets import targets
from modelfleet.runtime.errors import (
    InvalidBundleError,
    InvalidInputError,
    ModelfleetError,
    NotFoundError,
    UnavailableError,
)

from modelfleet_tools.export.quiet import first_line
from modelfleet_tools.health import wait_until_healthy
from modelfleet_tools.importing import SCHEME, fetch, keep_graph
from modelfleet_tools.options import open_client
from modelfleet_tools.output import tell, tell_error
from modelfleet_tools.pushing import aliases_of, push_folder

if TYPE_CHECKING:  # obstore has it in its hints only
    from obstore.store import ClientConfig

VARIABLE = "MODELFLEET_INITIAL_MODELS"
_PUSH_TIMEOUT_S = 3600.0
# After an install the images are still being pulled.
_MANAGER_TIMEOUT_S = 900.0
# A file may be large, but its bytes may not stall. An endpoint of plain HTTP is meant as it is written.
_CONNECTION: "ClientConfig" = {"timeout": "1 day", "read_timeout": "30s", "allow_http": True}


@dataclass(frozen=True, slots=True)
class InitialModel:
    """
    A model to register: from a folder, `hf://org/name[@revision]` (of which `graph` is taken) or `s3://bucket/…`.

    `pools` alone serve it, or all where none is named.
    """

    name: str
    alias: str
    source: str
    graph: str | None = None
    pools: tuple[str, ...] = ()


def read_models(text: str) -> tuple[InitialModel, ...]:
    """Read the JSON list of models. Raises InvalidInputError."""
    try:
        return tuple(InitialModel(**entry) for entry in json.loads(text))
    except (ValueError, TypeError) as error:
        raise InvalidInputError(f"{VARIABLE} is no list of name, alias and source: {error}.") from error


def register(client: Client, model: InitialModel) -> None:
    """
    Push a model whose alias does not exist yet.

    An alias that exists stays where it is: since the first install, a rollout may have moved it.
    """
    if number := aliases_of(client, model.name).get(model.alias):
        tell(f"{model.name}@{model.alias} is there already: version {number}. Other versions come by rollouts.")
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = _fetched(model, Path(scratch) / "bundle")
        pushed = push_folder(client, folder, model.name, model.alias, pools=model.pools, timeout_s=_PUSH_TIMEOUT_S)
    tell(f"{model.name}@{model.alias} is now version {pushed.model_version.model_version}.")


def _fetched(model: InitialModel, scratch: Path) -> Path:
    """Return the folder of a model's bundle, below `scratch` unless it is one already."""
    if model.source.startswith(SCHEME):
        imported = fetch(model.source, model.graph, tell)
        if imported.graph is None:
            raise InvalidBundleError(
                f"{model.source} has weights and no ONNX graph. Run `modelfleet import` where torch is installed, and "
                "name the folder that it writes, or a bucket with it, as the source."
            )
        keep_graph(imported, scratch, overwrite=False)
        return scratch
    if model.source.startswith("s3://"):
        _fetch_bucket(model.source, scratch)
        return scratch
    if "://" in model.source:
        raise InvalidInputError(f"{model.source!r} is no source. Give a folder, hf://org/name or s3://bucket/prefix.")
    return Path(model.source)


def _fetch_bucket(url: str, folder: Path) -> None:
    import obstore  # noqa: PLC0415  only few sources need it
    from obstore.exceptions import BaseError  # noqa: PLC0415
    from obstore.store import from_url  # noqa: PLC0415

    tell(f"Fetching {url} …")
    try:
        store = from_url(url, client_options=_CONNECTION)
        for found in chain.from_iterable(store.list()):
            path = folder / found["path"]
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as output:
                for chunk in obstore.get(store, found["path"]).stream():
                    output.write(chunk)
    except BaseError as error:
        raise UnavailableError(
            f"The bucket cannot be read: {first_line(error)} Check its name, the credentials and the endpoint."
        ) from error
    if not folder.exists():
        raise NotFoundError(f"There is nothing below {url}. Give the prefix that has config.json right below it.")


def main() -> None:
    """Register all models; one that fails is told of, and the others are registered."""
    try:
        models = read_models(os.environ.get(VARIABLE, "[]"))
        manager = targets(None, None, None)[Service.MANAGER]
        tell(f"Waiting for the manager at {manager} …")
        wait_until_healthy(manager, time.monotonic() + _MANAGER_TIMEOUT_S)
    except ModelfleetError as error:
        tell_error(error.message)
        sys.exit(1)
    failed = False
    with open_client() as client:
        for model in models:
            try:
                register(client, model)
            except (ModelfleetError, OSError) as error:
                tell_error(f"{model.name} from {model.source}: {error}")
                failed = True
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
