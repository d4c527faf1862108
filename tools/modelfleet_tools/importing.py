"""`modelfleet import`: a model of the Hugging Face hub, or of a folder in its layout, as a bundle."""

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from http import HTTPStatus
from pathlib import Path

import yaml
from modelfleet.bundle.directory import open_directory
from modelfleet.bundle.graph import check_graph
from modelfleet.bundle.infer import infer_manifest
from modelfleet.bundle.manifest import MANIFEST_FILE
from modelfleet.runtime.errors import (
    InvalidBundleError,
    InvalidInputError,
    ModelfleetError,
    NotFoundError,
    UnavailableError,
)

from modelfleet_tools.export.bundle_folder import NOTICES, new_folder, write_manifest
from modelfleet_tools.export.quiet import first_line
from modelfleet_tools.extras import needs_extra

SCHEME = "hf://"
_GRAPHS = ("model.onnx", "onnx/model.onnx")
_BESIDE = ("*.json", "*.txt", "*.yaml", "*.jinja", *NOTICES, "1_Pooling/*")
_NAMED = 8
TIMEOUT_S = 30.0
_REFUSED = (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN)


@dataclass(frozen=True, slots=True)
class Imported:
    """Where the files came from, and the graph that was taken; None when the weights are to be exported."""

    source: str
    revision: str | None
    graph: str | None
    folder: Path


def fetch(source: str, graph: str | None, tell: Callable[[str], None]) -> Imported:
    """
    Return a folder with the files of a model: the given one, or the hub's cache after a download.

    Of a repository with ONNX graphs, one of them is fetched (`graph`, else model.onnx), and of others the weights.
    Raises NotFoundError, UnavailableError, and InvalidInputError for a graph that is not there.
    """
    if not source.startswith(SCHEME):
        folder = Path(source)
        if not folder.is_dir():
            raise NotFoundError(f"{source} is no folder. Give a folder, or {SCHEME}ORGANISATION/NAME[@REVISION].")
        files = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
        return Imported(source, None, chosen_graph(files, graph, source), folder)
    repository, _, revision = source.removeprefix(SCHEME).partition("@")
    if len(repository.split("/")) > 2 or not repository:  # noqa: PLR2004  an organisation and a name
        raise InvalidInputError(f"{source!r} names no repository. Write {SCHEME}ORGANISATION/NAME[@REVISION].")
    return _from_hub(source, repository, revision or None, graph, tell)


def chosen_graph(files: Sequence[str], wanted: str | None, source: str) -> str | None:
    """Return the graph among the files, None where there is none. Raises InvalidInputError when that is undecided."""
    graphs = sorted(path for path in files if path.endswith(".onnx"))
    if wanted:
        if wanted not in graphs:
            raise InvalidInputError(
                f"{source} has no graph {wanted!r}. It has {', '.join(graphs[:_NAMED]) or 'none'}.", field="graph"
            )
        return wanted
    preferred = next((path for path in _GRAPHS if path in graphs), None)
    if preferred or not graphs:
        return preferred
    if len(graphs) == 1:
        return graphs[0]
    raise InvalidInputError(
        f"{source} has several graphs: {', '.join(graphs[:_NAMED])}. Choose one with --graph.", field="graph"
    )


def keep_graph(imported: Imported, out: Path, *, overwrite: bool) -> None:
    """Write the bundle of a folder that has its graph. Raises InvalidBundleError, StateConflictError."""
    assert imported.graph
    with new_folder(out, overwrite=overwrite) as fresh:
        data = check_graph(imported.folder / imported.graph, imported.folder)
        for path in sorted(imported.folder.rglob("*")):
            name = path.relative_to(imported.folder).as_posix()
            wanted = any(fnmatch(name, pattern) for pattern in _BESIDE) or name in {imported.graph, *data}
            if path.is_file() and wanted and not name.startswith("."):
                (fresh / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, fresh / name)
        write_manifest(infer_manifest(fresh, {**_given(fresh), "model": imported.graph}), fresh)
        open_directory(fresh)


def _weights(files: Sequence[str], source: str) -> str:
    pattern = "*.safetensors"
    if not any(fnmatch(path, pattern) for path in files):
        raise InvalidBundleError(f"{source} has neither ONNX graphs nor safetensors. Convert it.", field="path")
    return pattern


def _given(folder: Path) -> dict[str, object]:
    """Return the fields of a manifest that came with the files."""
    path = folder / MANIFEST_FILE
    try:
        given = yaml.safe_load(path.read_bytes()) if path.is_file() else {}
    except yaml.YAMLError as error:
        raise InvalidBundleError(f"{path} cannot be read: {error}. Correct it.", field=MANIFEST_FILE) from error
    return given if isinstance(given, dict) else {}


def _from_hub(
    source: str, repository: str, revision: str | None, graph: str | None, tell: Callable[[str], None]
) -> Imported:
    with needs_extra("jobs"):
        from huggingface_hub import HfApi, snapshot_download  # noqa: PLC0415  takes a while to import
        from huggingface_hub.errors import (  # noqa: PLC0415
            GatedRepoError,
            HfHubHTTPError,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )

    tell(f"Asking the hub for {repository} …")
    try:
        endpoint = os.environ.get("HF_ENDPOINT")
        found = HfApi(endpoint).model_info(repository, revision=revision, timeout=TIMEOUT_S)
        files = [sibling.rfilename for sibling in found.siblings or ()]
        chosen = chosen_graph(files, graph, source)
        weights = f"{chosen}*" if chosen else _weights(files, source)
        tell(f"Fetching {chosen or 'weights'} of revision {found.sha} …")
        folder = snapshot_download(
            repository,
            revision=found.sha,
            allow_patterns=[*_BESIDE, weights],
            endpoint=endpoint,
            etag_timeout=TIMEOUT_S,
        )
    except GatedRepoError as error:
        raise InvalidInputError(
            f"{repository} is gated: accept its terms on the hub, and set HF_TOKEN to a token of that account."
        ) from error
    except RepositoryNotFoundError as error:
        raise NotFoundError(
            f"The hub has no model {repository}, or it is private: set HF_TOKEN to a token that may read it."
        ) from error
    except RevisionNotFoundError as error:
        raise NotFoundError(f"{repository} has no revision {revision!r}.") from error
    except ModelfleetError:
        raise
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in _REFUSED:
            raise InvalidInputError(
                f"The hub refuses access to {repository} ({status}). Set HF_TOKEN to a token that may read it."
            ) from error
        raise _unreachable(error) from error
    except Exception as error:  # the client raises what its HTTP library does, and that has changed before
        raise _unreachable(error) from error
    return Imported(source, found.sha, chosen, Path(folder))


def _unreachable(error: Exception) -> UnavailableError:
    return UnavailableError(
        f"The hub cannot be reached or failed: {first_line(error)} Retry, or import a local folder."
    )
