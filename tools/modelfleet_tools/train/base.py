"""The base of a head: a registered `embed` model, whose files come from the manager."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc
import numpy as np
from modelfleet.api.manager.v1 import model_service_pb2, model_service_pb2_grpc
from modelfleet.bundle.bundle import hash_file
from modelfleet.bundle.manifest import Manifest, Task
from modelfleet.client.answers import ModelVersion
from modelfleet.client.channel import open_channel
from modelfleet.client.client import Client
from modelfleet.client.errors import from_rpc_error
from modelfleet.client.targets import targets
from modelfleet.runtime.errors import DigestMismatchError, WrongTaskError
from numpy.typing import NDArray

# Several requests, which the client has under way together and repeats when a queue is full.
_TEXTS = 2048
_DOWNLOAD_S = 3600


@dataclass(frozen=True, slots=True)
class Base:
    """A version of a model, by number, so that it stays the same while its alias moves."""

    version: ModelVersion
    manifest: Manifest

    @property
    def reference(self) -> str:
        """How requests name it."""
        return f"{self.version.model}@{self.version.model_version}"


def find_base(client: Client, reference: str) -> Base:
    """Return the model that a reference names. Raises WrongTaskError unless it embeds, and what the manager says."""
    version = client.get_model_version(reference)
    manifest = Manifest.from_json(version.manifest_json)
    if manifest.task is not Task.EMBED:
        raise WrongTaskError(
            f"{reference} is of the task {manifest.task.value}; a head needs a base of the task embed."
        )
    return Base(version, manifest)


@dataclass(frozen=True, slots=True, eq=False)
class Embedded:
    """Vectors [texts, dimensions], and how many of the texts were cut to fit the base."""

    vectors: NDArray[np.float32]
    cut: int


def embed_texts(client: Client, base: Base, texts: Sequence[str], progress: Callable[[int], None]) -> Embedded:
    """Embed texts by the served base. `progress` hears how many more are done."""
    vectors, cut = [], 0
    for first in range(0, len(texts), _TEXTS):
        answer = client.embed(base.reference, texts[first : first + _TEXTS])
        vectors.append(answer.vectors)
        cut += sum(usage.truncated for usage in answer.usage)
        progress(len(answer.vectors))
    return Embedded(np.concatenate(vectors), cut)


def download(base: Base, manager: str | None, folder: Path) -> None:
    """Write the base's files into a folder. Raises DigestMismatchError, and what the manager says."""
    target = next(value for service, value in targets(None, None, manager).items() if service == "manager")
    with open_channel(target) as channel:
        stub = model_service_pb2_grpc.ModelServiceStub(channel)
        for file in base.version.files:
            path = folder / file.path
            path.parent.mkdir(parents=True, exist_ok=True)
            request = model_service_pb2.DownloadBlobRequest(sha256=file.sha256)
            try:
                with path.open("wb") as content:
                    for piece in stub.DownloadBlob(request, timeout=_DOWNLOAD_S):
                        content.write(piece.data)
            except grpc.RpcError as error:
                raise from_rpc_error(error) from error
            if hash_file(path)[0] != file.sha256:
                raise DigestMismatchError(f"{file.path} of {base.reference} arrived with another SHA-256. Try again.")
