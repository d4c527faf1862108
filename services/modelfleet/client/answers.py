"""What calls return."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from modelfleet.client.packing import Ids, Vectors


@dataclass(frozen=True, slots=True)
class TextUsage:
    """What was done with one text: its tokens before any cut, whether some were cut, the windows that covered it."""

    token_count: int
    truncated: bool
    window_count: int


@dataclass(frozen=True, slots=True)
class Embeddings:
    """`vectors` is float32 [texts, dimensions]; `usage` has one entry a text."""

    vectors: Vectors
    usage: tuple[TextUsage, ...]
    model: str
    model_version: int


@dataclass(frozen=True, slots=True)
class LabelScore:
    """A label and its probability, 0 to 1."""

    label: str
    score: float


@dataclass(frozen=True, slots=True)
class Classification:
    """The labels of one text by falling score."""

    labels: tuple[LabelScore, ...]
    usage: TextUsage


@dataclass(frozen=True, slots=True)
class Classifications:
    """`results` has one entry a text."""

    results: tuple[Classification, ...]
    model: str
    model_version: int


@dataclass(frozen=True, slots=True)
class Entity:
    """A labelled span of a text: characters `start` to `end` (exclusive) in code points, score 0 to 1."""

    label: str
    text: str
    start: int
    end: int
    score: float


@dataclass(frozen=True, slots=True)
class TextEntities:
    """The entities of one text in order of `start`, without overlaps."""

    entities: tuple[Entity, ...]
    usage: TextUsage


@dataclass(frozen=True, slots=True)
class ExtractedEntities:
    """`results` has one entry a text."""

    results: tuple[TextEntities, ...]
    model: str
    model_version: int


@dataclass(frozen=True, slots=True)
class RankedDocument:
    """A document's index in the request, and its relevance: 0 to 1, or any number for raw scores."""

    index: int
    score: float
    usage: TextUsage


@dataclass(frozen=True, slots=True)
class Ranking:
    """Documents by falling score; equal scores in order of the request."""

    documents: tuple[RankedDocument, ...]
    model: str
    model_version: int


@dataclass(frozen=True, slots=True)
class Tokens:
    """
    Encoded texts as windows, in order of the texts; the windows of one text follow one another.

    `ids` and `type_ids` have one int32 [tokens] array a window, `offsets` one int32 [tokens, 2] array a window when
    asked for, else none. `window_counts` and `token_counts` (before any cut) are int32 [texts].
    """

    ids: tuple[Ids, ...]
    type_ids: tuple[Ids, ...]
    offsets: tuple[Ids, ...]
    window_counts: Ids
    token_counts: Ids


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model version on the worker that answered. `state` is such as `READY`, `task` such as `embed`."""

    model: str
    model_version: int
    bundle_digest: str
    task: str
    state: str
    state_reason: str
    aliases: tuple[str, ...]
    providers: tuple[str, ...]
    max_tokens: int
    max_batch_tokens: int
    labels: tuple[str, ...]
    tokenizer_digest: str
    batching: str
    """`padded`, `same-shape` or `alone`: which rows share a run; empty where that is not known."""
    batching_deviation: float
    """By how much answers in company differ from those alone, as a share of their largest magnitude."""


@dataclass(frozen=True, slots=True)
class Model:
    """
    A registered model: its aliases and the version that each names, its newest version or 0.

    `pools` are those that serve it, none for all.
    """

    model: str
    aliases: Mapping[str, int]
    latest_model_version: int
    task: str
    create_time: datetime
    pools: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class File:
    """A file of a model version; `size` is in bytes."""

    path: str
    sha256: str
    size: int


@dataclass(frozen=True, slots=True)
class ModelVersion:
    """A registered version. `manifest_json` holds the fields of `modelfleet.yaml`."""

    model: str
    model_version: int
    bundle_digest: str
    manifest_json: str
    files: tuple[File, ...]
    create_time: datetime


@dataclass(frozen=True, slots=True)
class Pushed:
    """`created` is false when the model had this bundle as a version already. `sent_bytes` counts the blobs sent."""

    model_version: ModelVersion
    created: bool
    sent_bytes: int


@dataclass(frozen=True, slots=True)
class Garbage:
    """Blobs that no model version has. `sizes` are the bytes of the first 1000 by digest; the others count them all."""

    sizes: Mapping[str, int]
    blob_count: int
    bytes: int


@dataclass(frozen=True, slots=True)
class BlobProblem:
    """
    A blob that is `MISSING` (its bytes are gone), `CORRUPT`, or an `ORPHAN` (bytes that are registered as no blob).

    `model_versions` are those that have it, such as `pii@1`, at most 100. `repaired` says that something was deleted.
    """

    kind: str
    sha256: str
    detail: str
    model_versions: tuple[str, ...]
    repaired: bool


@dataclass(frozen=True, slots=True)
class BlobReport:
    """What a check of the blobs found, by digest, and how much of them it looked at and read."""

    problems: tuple[BlobProblem, ...]
    checked_blobs: int
    checked_bytes: int


@dataclass(frozen=True, slots=True)
class WorkerProgress:
    """A worker and the state of a rollout's new version on it, empty when it does not hold it; FAILED has a reason."""

    worker: str
    pool: str
    state: str
    reason: str
    current: bool

    @property
    def is_ready(self) -> bool:
        """Whether it answers with the new version when asked to."""
        return self.current and self.state == "READY"


@dataclass(frozen=True, slots=True)
class VersionFigures:
    """What a version did in the current step of a canary; `p99_s` is None without requests."""

    request_count: int
    failure_count: int
    p99_s: float | None


@dataclass(frozen=True, slots=True)
class RolloutEvent:
    """A state that a rollout entered, such as `FLIPPING`, and the new version's percent of requests from then on."""

    state: str
    percent: int
    reason: str
    time: datetime


@dataclass(frozen=True, slots=True)
class Rollout:
    """
    A rollout of `model@alias` to `model_version`; `old_model_version` is 0 where the alias named nothing.

    `workers` are empty once it is over; figures are there in CANARY only.
    """

    rollout: int
    model: str
    alias: str
    model_version: int
    old_model_version: int
    canary_percents: tuple[int, ...]
    state: str
    reason: str
    percent: int
    workers: tuple[WorkerProgress, ...]
    old_figures: VersionFigures | None
    new_figures: VersionFigures | None
    events: tuple[RolloutEvent, ...]
    create_time: datetime

    @property
    def is_over(self) -> bool:
        """Whether nothing more happens to it."""
        return self.state in ("SUCCEEDED", "FAILED", "ABORTED")


@dataclass(frozen=True, slots=True)
class WorkerVersion:
    """A model version on a worker. `state` is such as `READY`; `state_reason` says why it FAILED, or is not watched."""

    model: str
    model_version: int
    state: str
    state_reason: str
    providers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class PoolWorker:
    """A worker of a pool. `problem` says what keeps it from being ready; node and image are empty off Kubernetes."""

    worker: str
    node: str
    ready: bool
    image: str
    problem: str
    restart_count: int
    versions: tuple[WorkerVersion, ...]


@dataclass(frozen=True, slots=True)
class Pool:
    """Workers that are alike in hardware, as they were at `observe_time`, ordered by name."""

    pool: str
    desired_replicas: int
    ready_replicas: int
    gpu_resource: str
    gpus_per_worker: int
    images: tuple[str, ...]
    problem: str
    workers: tuple[PoolWorker, ...]
    observe_time: datetime
