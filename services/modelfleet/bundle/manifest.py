"""The manifest: what a bundle's files are for. `modelfleet.yaml` on disk, JSON on the wire."""

import json
from collections.abc import Mapping
from enum import StrEnum
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from modelfleet.runtime.errors import InvalidBundleError

MANIFEST_FILE = "modelfleet.yaml"


class Task(StrEnum):
    """What a model answers."""

    EMBED = "embed"
    CLASSIFY = "classify"
    ENTITIES = "entities"
    RERANK = "rerank"
    GENERATE = "generate"
    TENSOR = "tensor"


class Pooling(StrEnum):
    """How token vectors become one vector."""

    MEAN = "mean"
    """Mean over the tokens that are no padding."""
    CLS = "cls"
    """The first token's."""
    LAST = "last"
    """The last token's that is no padding."""
    MAX = "max"
    """The largest of each dimension over the tokens that are no padding."""
    WEIGHTED_MEAN = "weighted-mean"
    """Mean where the first token weighs 1, the second 2, and so on."""
    MEAN_SQRT_LENGTH = "mean-sqrt-length"
    """Sum over the tokens, divided by the square root of their number."""
    MODEL = "model"
    """The graph pools by itself: its output is [batch, dimensions]."""


class Activation(StrEnum):
    """How logits become probabilities."""

    SOFTMAX = "softmax"
    """One label is right."""
    SIGMOID = "sigmoid"
    """Each label is right or not."""
    NONE = "none"
    """They stay what they are: scores of a regression."""


class Aggregation(StrEnum):
    """How the labels of a word's tokens become the word's."""

    SIMPLE = "simple"
    """Not at all: each token has its own, and an entity may be a part of a word."""
    FIRST = "first"
    """The first token's is the word's."""
    MAX = "max"
    """That of the token whose label is surest is the word's."""
    AVERAGE = "average"
    """The mean of the tokens' probabilities is the word's."""


class Batching(StrEnum):
    """Which rows share a run of the graph."""

    PADDED = "padded"
    """Rows of different lengths, padded to the longest. For models that read text."""
    SAME_SHAPE = "same-shape"
    """Only rows of equal lengths, or shapes."""
    ALONE = "alone"
    """None: each row of a text model, and each request to a `tensor` model, has a run of its own."""


class Manifest(BaseModel):
    """A bundle's manifest. Paths are relative to the bundle, with `/`."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    task: Task
    model: str
    """Path of the ONNX graph."""
    tokenizer: str | None = None
    """Path of `tokenizer.json`. Every task but `tensor` needs one."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Most tokens in one sequence, special tokens included. Every task but `tensor` needs it."""
    vocabulary_size: int | None = Field(default=None, ge=1)
    """Token ids are 0 to vocabulary_size - 1. Where absent, only the session finds ids outside of it."""
    pad_token_id: int = Field(default=0, ge=0)
    """Token id that fills short sequences."""
    output: str | None = None
    """Name of the graph's output that is read; its first when absent."""
    control_tokens_as_text: bool = False
    """
    For models that read text: a special token that a text spells, such as `</s>`, stays text.

    Models that judge what users write, such as those that find injections, were taught on text.
    """
    labels: tuple[str, ...] = ()
    """Labels in the order of the outputs; `entities` models write them B-X, I-X and O."""
    pooling: Pooling = Pooling.MEAN
    """For `embed`."""
    normalize: bool = False
    """For `embed`: scale vectors to L2 norm 1."""
    aggregation: Aggregation = Aggregation.FIRST
    """For `entities`, where a request does not say."""
    prompt: str = ""
    """For `embed`: text that is put before each text."""
    truncate_dimensions: int | None = Field(default=None, ge=1)
    """For `embed`: how many leading dimensions are answered where a request does not say; all when absent."""
    activation: Activation = Activation.SOFTMAX
    """For `classify`. For `rerank`, `none` lets scores be logits; they are sigmoids of those otherwise."""
    allow_nan: bool = False
    """For `tensor`: take NaN in inputs, as models do that know missing values."""
    max_batch_rows: int | None = Field(default=None, ge=1)
    """For `tensor`: most elements in a batch; the worker's limit holds where it is lower."""
    batching: Batching | None = None
    """
    The most that rows may share. When absent, workers find it out: rows share a run where they answer in company what
    they answer alone. A version that is asked for more than that is refused; where nothing can be found out, for lack
    of inputs that the graph takes, what stands here holds, or `alone`.
    """
    batching_tolerance: float | None = Field(default=None, ge=0)
    """
    How far an answer in company may be from the answer alone, as a share of its largest magnitude.

    When absent: 0.0001, or 0.005 on a GPU, 0.01 for a graph with fp16 weights and 0.1 for a quantized one, whose scales
    are those of a whole batch.
    """
    golden_tolerance: float | None = Field(default=None, ge=0)
    """
    How far outputs may be from those of the golden examples, as a share of the largest recorded magnitude.

    When absent: 0.005, or 0.02 for a graph with fp16 weights and 0.1 for a quantized one. For `generate`: by how much
    a recorded token led any other, in log-odds, where another in its place is a fault; 1 when absent.
    """
    chat_template: str | None = None
    """For `generate`: path of the Jinja template, or of the `tokenizer_config.json` that has it."""
    special_tokens: Mapping[str, str] = Field(default_factory=dict)
    """For `generate`: what the chat template calls by name, such as `bos_token`."""
    adapter: str | None = None
    """
    For `generate`: path of a LoRA adapter in ONNX Runtime's format (`.onnx_adapter`), which is laid over the graph.

    Versions with the same graph share it, in the manager's store and in a worker's memory.
    """
    max_streams: int | None = Field(default=None, ge=1)
    """For `generate`: most continuations at once on one worker; the worker's setting when absent."""
    license: str | None = None
    """SPDX identifier or name of the weights' licence."""

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.task is not Task.TENSOR:
            if self.tokenizer is None:
                raise ValueError(f"a model of the task {self.task.value!r} needs a tokenizer: add tokenizer.json")
            if self.max_tokens is None:
                raise ValueError(f"a model of the task {self.task.value!r} needs max_tokens")
        if self.task in (Task.CLASSIFY, Task.ENTITIES) and not self.labels:
            raise ValueError(f"a model of the task {self.task.value!r} needs labels, in the order of its outputs")
        return self

    def to_json(self) -> str:
        """
        Return the canonical JSON, which a bundle's digest covers: sorted keys, no spaces, no defaults.

        Without defaults, since a release that adds a field must not change the digests of the bundles before it.
        """
        return json.dumps(
            self.model_dump(mode="json", exclude_defaults=True),
            sort_keys=True,
            separators=(",", ":"),
            ensure_ascii=False,
        )

    @classmethod
    def from_json(cls, text: str | bytes, *, source: str = "manifest_json") -> Self:
        """Read and check a manifest. Raises InvalidBundleError that names `source` and each field at fault."""
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise InvalidBundleError(f"{source}: {_explained(error)}", field=source) from None

    @classmethod
    def from_mapping(cls, values: object, *, source: str) -> Self:
        """Check a manifest that was read from YAML. Raises InvalidBundleError that names `source`."""
        return cls.from_json(json.dumps(values), source=source)


def _explained(error: ValidationError) -> str:
    problems = []
    for problem in error.errors(include_url=False):
        where = ".".join(str(part) for part in problem["loc"]) or "manifest"
        problems.append(f"{where}: {problem['msg'].removeprefix('Value error, ')}")
    return "; ".join(problems)
