"""Calls of the manager."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from modelfleet.api.manager.v1 import model_service_pb2 as pb
from modelfleet.client.answers import File, Model, ModelVersion, Pushed
from modelfleet.client.steps import Method, Procedure, Service, ask, pause, upload
from modelfleet.runtime.errors import InvalidBundleError, UnavailableError

if TYPE_CHECKING:  # the bare client has no pydantic, which bundles need; whoever pushes has
    from modelfleet.bundle.bundle import Bundle

Progress: TypeAlias = Callable[[int, int], None]

_PATH = "/modelfleet.api.manager.v1.ModelService"
FIND_MISSING_BLOBS = Method(Service.MANAGER, f"{_PATH}/FindMissingBlobs", pb.FindMissingBlobsResponse)
PUSH_MODEL_VERSION = Method(Service.MANAGER, f"{_PATH}/PushModelVersion", pb.PushModelVersionResponse)
GET_MODEL = Method(Service.MANAGER, f"{_PATH}/GetModel", pb.GetModelResponse)
LIST_MODELS = Method(Service.MANAGER, f"{_PATH}/ListModels", pb.ListModelsResponse)
GET_MODEL_VERSION = Method(Service.MANAGER, f"{_PATH}/GetModelVersion", pb.GetModelVersionResponse)
LIST_MODEL_VERSIONS = Method(Service.MANAGER, f"{_PATH}/ListModelVersions", pb.ListModelVersionsResponse)
DELETE_MODEL_VERSION = Method(Service.MANAGER, f"{_PATH}/DeleteModelVersion", pb.DeleteModelVersionResponse)
SET_ALIAS = Method(Service.MANAGER, f"{_PATH}/SetAlias", pb.SetAliasResponse)
PLACE_MODEL = Method(Service.MANAGER, f"{_PATH}/PlaceModel", pb.PlaceModelResponse)
DELETE_ALIAS = Method(Service.MANAGER, f"{_PATH}/DeleteAlias", pb.DeleteAliasResponse)

CHUNK_BYTES = 1 << 20
_PUSH_TRIES = 3


def models(*, timeout_s: float | None = None) -> Procedure[tuple[Model, ...]]:
    """List all registered models, ordered by name."""
    found: list[Model] = []
    request = pb.ListModelsRequest()
    while True:
        page = yield from ask(LIST_MODELS, request, timeout_s)
        found.extend(_model(model) for model in page.models)
        if not page.next_page_token:
            return tuple(found)
        request = pb.ListModelsRequest(page_token=page.next_page_token)


def get_model(model: str, *, timeout_s: float | None = None) -> Procedure[Model]:
    """Return a registered model. Raises ModelNotFoundError."""
    response = yield from ask(GET_MODEL, pb.GetModelRequest(model=model), timeout_s)
    return _model(response.model)


def model_versions(model: str, *, timeout_s: float | None = None) -> Procedure[tuple[ModelVersion, ...]]:
    """List all versions of a model, newest first."""
    found: list[ModelVersion] = []
    request = pb.ListModelVersionsRequest(model=model)
    while True:
        page = yield from ask(LIST_MODEL_VERSIONS, request, timeout_s)
        found.extend(_model_version(version) for version in page.model_versions)
        if not page.next_page_token:
            return tuple(found)
        request = pb.ListModelVersionsRequest(model=model, page_token=page.next_page_token)


def get_model_version(model: str, *, timeout_s: float | None = None) -> Procedure[ModelVersion]:
    """Return the version that a model reference names."""
    response = yield from ask(GET_MODEL_VERSION, pb.GetModelVersionRequest(model=model), timeout_s)
    return _model_version(response.model_version)


def delete_model_version(model: str, model_version: int, *, timeout_s: float | None = None) -> Procedure[None]:
    """Delete a version. Raises StateConflictError while an alias names it."""
    request = pb.DeleteModelVersionRequest(model=model, model_version=model_version)
    yield from ask(DELETE_MODEL_VERSION, request, timeout_s)


def set_alias(model: str, alias: str, model_version: int, *, timeout_s: float | None = None) -> Procedure[None]:
    """Point an alias at a version, creating the alias where it is new."""
    request = pb.SetAliasRequest(model=model, alias=alias, model_version=model_version)
    yield from ask(SET_ALIAS, request, timeout_s)


def place_model(model: str, pools: Sequence[str] = (), *, timeout_s: float | None = None) -> Procedure[Model]:
    """Let some pools alone serve a model, or all where none is given. Workers of the others unload it."""
    response = yield from ask(PLACE_MODEL, pb.PlaceModelRequest(model=model, pools=pools), timeout_s)
    return _model(response.model)


def delete_alias(model: str, alias: str, *, timeout_s: float | None = None) -> Procedure[None]:
    """Delete an alias."""
    yield from ask(DELETE_ALIAS, pb.DeleteAliasRequest(model=model, alias=alias), timeout_s)


def push(
    bundle: "Bundle",
    paths: Mapping[str, Path],
    name: str,
    *,
    alias: str = "",
    pools: Sequence[str] = (),
    progress: Progress | None = None,
    timeout_s: float = 3600,
) -> Procedure[Pushed]:
    """
    Register a bundle as a version of the model `name`, and point `alias` at it. Only blobs that are missing are sent.

    `paths` says where each file of the bundle lies, as `open_directory` returns it. `pools` places the model on these
    alone; without any it stays where it is, a new one on all. `progress` is called with the bytes
    sent so far and the bytes to send. A manager that goes away meanwhile is tried again, from the blobs it has on.
    """
    header = pb.PushHeader(
        model=name,
        manifest_json=bundle.manifest.to_json(),
        files=[pb.BundleFile(path=file.path, sha256=file.sha256, size=file.size) for file in bundle.files],
        alias=alias,
        pools=pools,
    )
    for tries_left in reversed(range(_PUSH_TRIES)):
        try:
            return (yield from _push(header, paths, progress or _silent, timeout_s))
        except UnavailableError as error:
            if not tries_left:
                raise
            yield from pause(error.retry_after_s or 1)
    raise AssertionError("the last try returns or raises")


def _push(header: pb.PushHeader, paths: Mapping[str, Path], progress: Progress, timeout_s: float) -> Procedure[Pushed]:
    files = {file.sha256: file for file in header.files}  # equal files share a blob
    response = yield from ask(FIND_MISSING_BLOBS, pb.FindMissingBlobsRequest(sha256=files), None)
    missing = [files[digest] for digest in response.missing_sha256]
    pushed = yield from upload(PUSH_MODEL_VERSION, _messages(header, missing, paths, progress), timeout_s)
    return Pushed(_model_version(pushed.model_version), pushed.created, sum(file.size for file in missing))


def _messages(
    header: pb.PushHeader, missing: list[pb.BundleFile], paths: Mapping[str, Path], progress: Progress
) -> Iterator[pb.PushModelVersionRequest]:
    yield pb.PushModelVersionRequest(header=header)
    sent, total = 0, sum(file.size for file in missing)
    for file in missing:
        for data in _chunks(file.path, paths[file.path]):
            yield pb.PushModelVersionRequest(chunk=pb.BlobChunk(sha256=file.sha256, data=data))
            sent += len(data)
            progress(sent, total)


def _chunks(name: str, path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            yield file.read(CHUNK_BYTES)  # also of an empty file, which would not arrive otherwise
            while data := file.read(CHUNK_BYTES):
                yield data
    except OSError as error:
        raise InvalidBundleError(f"{name} cannot be read: {error.strerror}.", field="files") from error


def _silent(_sent: int, _total: int) -> None:
    pass


def _model(model: pb.Model) -> Model:
    return Model(
        model=model.model,
        aliases={alias.alias: alias.model_version for alias in model.aliases},
        latest_model_version=model.latest_model_version,
        task=model.task,
        create_time=model.create_time.ToDatetime(UTC),
        pools=tuple(model.pools),
    )


def _model_version(version: pb.ModelVersion) -> ModelVersion:
    return ModelVersion(
        model=version.model,
        model_version=version.model_version,
        bundle_digest=version.bundle_digest,
        manifest_json=version.manifest_json,
        files=tuple(File(file.path, file.sha256, file.size) for file in version.files),
        create_time=version.create_time.ToDatetime(UTC),
    )
