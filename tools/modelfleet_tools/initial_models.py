"""Pushes the models that MODELFLEET_INITIAL_MODELS names: what the chart's Job runs after an install or upgrade."""

import json
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from modelfleet.client.client import Client
from modelfleet.runtime.errors import InvalidInputError, ModelfleetError

from modelfleet_tools.options import open_client
from modelfleet_tools.output import tell, tell_error
from modelfleet_tools.registry import push_folder

VARIABLE = "MODELFLEET_INITIAL_MODELS"
_PUSH_TIMEOUT_S = 3600.0
# What a bundle needs of a hub's repository, which may also hold weights for other runtimes and other graphs.
_WANTED = ["*.json", "*.txt", "*.yaml", "*.jinja", "*.model", "LICENSE*", "NOTICE*"]
_WANTED_GRAPHS = ["model.onnx*", "onnx/model.onnx*"]


@dataclass(frozen=True, slots=True)
class InitialModel:
    """A model to push: from a folder, `hf://org/name[@revision]` or `s3://bucket/prefix`."""

    name: str
    alias: str
    source: str


def read_models(text: str) -> tuple[InitialModel, ...]:
    """Read the JSON list of models. Raises InvalidInputError."""
    try:
        return tuple(InitialModel(**entry) for entry in json.loads(text))
    except (ValueError, TypeError) as error:
        raise InvalidInputError(f"{VARIABLE} is no list of name, alias and source: {error}.") from error


def push_model(client: Client, model: InitialModel, scratch: Path) -> None:
    """Fetch a model where it is not a folder already, and push it. Raises InvalidInputError for unknown sources."""
    scheme, separator, place = model.source.partition("://")
    if not separator:
        folder = Path(model.source)
    elif scheme == "hf":
        folder = _from_hub(place)
    elif scheme == "s3":
        folder = _from_bucket(model.source, scratch / model.name)
    else:
        raise InvalidInputError(f"{model.source!r} is no source. Give a folder, hf://org/name or s3://bucket/prefix.")
    pushed = push_folder(client, folder, model.name, model.alias, timeout_s=_PUSH_TIMEOUT_S)
    what = "pushed" if pushed.created else "was there already"
    tell(f"{model.name}@{pushed.model_version.model_version} {what}; {model.name}@{model.alias} names it.")


def _from_hub(place: str) -> Path:
    from huggingface_hub import snapshot_download  # noqa: PLC0415  takes a while to import

    repository, _, revision = place.partition("@")
    tell(f"Fetching {repository} …")
    return Path(snapshot_download(repository, revision=revision or None, allow_patterns=_WANTED + _WANTED_GRAPHS))


def _from_bucket(url: str, folder: Path) -> Path:
    import obstore  # noqa: PLC0415  only few sources need it
    from obstore.store import from_url  # noqa: PLC0415

    tell(f"Fetching {url} …")
    store = from_url(
        url, client_options={"allow_http": True}
    )  # where the endpoint that the environment names has no TLS
    for batch in store.list():
        for found in batch:
            path = folder / found["path"]
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as output:
                for chunk in obstore.get(store, found["path"]).stream():
                    output.write(chunk)
    return folder


def main() -> None:
    """Push all models; one that fails is told of, and the others are pushed."""
    failed = False
    with open_client() as client, tempfile.TemporaryDirectory() as scratch:
        for model in read_models(os.environ.get(VARIABLE, "[]")):
            try:
                push_model(client, model, Path(scratch))
            except (ModelfleetError, OSError) as error:
                tell_error(f"{model.name} from {model.source}: {error}")
                failed = True
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
