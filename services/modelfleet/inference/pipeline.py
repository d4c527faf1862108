"""
The way of a request: find the model, tokenize, run in batches, turn rows into results.

Every method holds its model version until it returns, so that no version is unloaded under a request. `deadline` is in
seconds on the monotonic clock, infinite where the caller set none.
"""

import asyncio
import functools
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractContextManager, asynccontextmanager
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from modelfleet.bundle.bundle import Bundle
from modelfleet.bundle.manifest import Activation, Aggregation, Task
from modelfleet.bundle.reference import ModelReference
from modelfleet.inference import metrics, row_faults
from modelfleet.inference.assignment import VersionKey
from modelfleet.inference.engine import Engine
from modelfleet.inference.jobs import RowsFailedError
from modelfleet.inference.models import HeldModel, TensorModel, TextModel
from modelfleet.inference.request_limits import RequestLimits
from modelfleet.inference.results import INLINE_SCORES, Classified, Embedded, Extracted, Inferred, Reranked
from modelfleet.inference.served_models import EvictedError, NotHeldError, ServedModels, ServedVersion
from modelfleet.inference.tasks import classify, embed, entities, rerank, tensors, windows
from modelfleet.inference.tasks.labelled_windows import LabelledWindow
from modelfleet.inference.tensor_spec import Array
from modelfleet.inference.token_ids import check_token_ids
from modelfleet.inference.tokenization import Tokenization, TokenizeOptions, Truncation, of_documents
from modelfleet.inference.tokens import Tokens
from modelfleet.runtime.errors import (
    DeadlineExpiredError,
    InvalidInputError,
    ModelfleetError,
    NotServedHereError,
    OverloadedError,
    UnavailableError,
    WrongTaskError,
)

Floats = NDArray[np.float32]

# Reading entities takes up to 4 us a token. More than this would hold up the event loop longer than a thread's hop.
_INLINE_TOKENS = 500

_NO_FAULT_OF_THE_VERSION = (InvalidInputError, DeadlineExpiredError, OverloadedError, UnavailableError)


class Registry(Protocol):
    """What the manager knows beyond this worker."""

    async def check_registered(self, reference: ModelReference) -> None:
        """Return if the reference leads to a version. Raises NotFoundError or ManagerUnreachableError."""


@dataclass(frozen=True, slots=True)
class TextInput:
    """Texts, or ready token ids in their place; how long texts are fitted to the model."""

    texts: Sequence[str] = ()
    tokens: Tokens | None = None
    truncation: Truncation = Truncation.RIGHT
    stride: int | None = None

    @property
    def field(self) -> str:
        """What the caller calls the list."""
        return "texts" if self.tokens is None else "token_ids"


class Pipeline:
    """Answers requests in the domain's words; servicers translate."""

    def __init__(
        self,
        served: ServedModels,
        registry: Registry,
        tokenization: Tokenization,
        engine: Engine,
        limits: RequestLimits,
    ) -> None:
        self._served = served
        self._registry = registry
        self._tokenization = tokenization
        self._engine = engine
        self._limits = limits

    async def embed(
        self,
        reference: ModelReference,
        text: TextInput,
        *,
        deadline: float,
        dimensions: int = 0,
        normalize: bool | None = None,
    ) -> Embedded:
        """
        Return one vector a text.

        `dimensions` keeps only leading ones, 0 as many as the manifest says; `normalize` None follows the manifest. Its
        prompt is put before each text, not before token ids.
        """
        _require_not_negative("dimensions", dimensions)
        async with self._text_model(reference, Task.EMBED) as (version, model):
            _require_dimensions(dimensions, version, model.output.shape[-1])
            text = _prompted(text, model.manifest.prompt, version)
            tokens = await self._tokens(version, model, text, deadline)
            vectors = np.stack(await self._run(model, tokens, deadline, text.field))
            _require_dimensions(dimensions, version, vectors.shape[1])  # not every graph says how many it has
            normalizes = model.manifest.normalize if normalize is None else normalize
            assembled = embed.assemble(
                vectors,
                tokens.lengths,
                tokens.window_counts,
                dimensions=dimensions or model.manifest.truncate_dimensions or 0,
                normalize=normalizes,
                cut_last=not dimensions and normalize is None,
            )
        return Embedded(version, assembled, tokens.usage())

    async def classify(
        self, reference: ModelReference, text: TextInput, *, deadline: float, top_k: int = 0
    ) -> Classified:
        """Return the best `top_k` labels of each text, 0 for all."""
        _require_not_negative("top_k", top_k)
        async with self._text_model(reference, Task.CLASSIFY) as (version, model):
            tokens = await self._tokens(version, model, text, deadline)
            rows = np.stack(await self._run(model, tokens, deadline, text.field))
            probabilities = windows.weighted_mean(rows, tokens.lengths, tokens.window_counts)
            rank = functools.partial(classify.all_ranked, probabilities, model.manifest.labels, top_k)
            labels = rank() if probabilities.size <= INLINE_SCORES else await asyncio.to_thread(rank)
        return Classified(version, labels, tokens.usage())

    async def extract_entities(
        self,
        reference: ModelReference,
        text: TextInput,
        *,
        deadline: float,
        min_score: float = 0.0,
        aggregation: Aggregation | None = None,
    ) -> Extracted:
        """Return the entities of each text with at least `min_score`; `aggregation` None follows the manifest."""
        if not 0 <= min_score <= 1:
            raise InvalidInputError(f"min_score is {min_score}. Give a number from 0 to 1.", field="min_score")
        async with self._text_model(reference, Task.ENTITIES) as (version, model):
            tokens = await self._tokens(version, model, text, deadline, with_offsets=True)
            rows = await self._run(model, tokens, deadline, text.field)
            read = functools.partial(
                entities.extract,
                labels=model.manifest.labels,
                min_score=min_score,
                aggregation=aggregation or model.manifest.aggregation,
            )
            extract = functools.partial(_entities, text.texts, tokens, rows, read)
            found = extract() if len(tokens.ids) <= _INLINE_TOKENS else await asyncio.to_thread(extract)
        return Extracted(version, found, tokens.usage())

    async def rerank(
        self,
        reference: ModelReference,
        query: str,
        documents: TextInput,
        *,
        deadline: float,
        top_k: int = 0,
        raw: bool = False,
    ) -> Reranked:
        """Return the best `top_k` documents (0 for all) by relevance; `raw` scores are logits."""
        _require_not_negative("top_k", top_k)
        self._limits.check_text(query, field="query")
        async with self._text_model(reference, Task.RERANK) as (version, model):
            tokens = await self._tokens(version, model, documents, deadline, query=query)
            rows = np.stack(await self._run(model, tokens, deadline, "documents"))
            logits = windows.best(rows, tokens.window_counts)[:, 0]
            raw = raw or model.manifest.activation is Activation.NONE
            ranked = rerank.ranked(logits, raw=raw, top_k=top_k)
        return Reranked(version, ranked, tokens.usage())

    async def infer(self, reference: ModelReference, inputs: Mapping[str, Array], *, deadline: float) -> Inferred:
        """Return the outputs of a `tensor` model for raw tensors."""
        async with self.held(reference) as (version, model):
            if not isinstance(model, TensorModel):
                raise _wrong_task(version, model.manifest.task, Task.TENSOR)
            rows, key = tensors.check(inputs, model.session.inputs, batches=model.batches, nan=model.manifest.allow_nan)
            self._limits.check_count(rows, "elements", field="inputs")
            try:
                results = await self._engine.submit(model, inputs, [1] * rows, deadline=deadline, key=key)
            except RowsFailedError as failed:
                error = row_faults.of_elements(failed.errors, "inputs") if model.batches else failed.first
                raise error from failed.first.__cause__
            outputs = tensors.joined(results, [spec.name for spec in model.session.outputs])
        return Inferred(version, outputs)

    @asynccontextmanager
    async def held(self, reference: ModelReference) -> AsyncIterator[tuple[VersionKey, HeldModel]]:
        """
        Hold the version that a reference leads to; one that is evicted is waited for.

        Raises NotFoundError, NotServedHereError, ModelLoadingError.
        """
        with await self._chosen(reference) as held:
            yield held

    async def _chosen(self, reference: ModelReference) -> AbstractContextManager[tuple[VersionKey, HeldModel]]:
        while True:
            try:
                return self._served.use(reference)
            except EvictedError as evicted:
                # By number from here on: the alias has chosen.
                key = evicted.version.key
                reference = ModelReference(key.model, None, key.model_version)
                await self._served.brought_back(evicted.version)
            except NotHeldError:
                raise await self._not_held(reference) from None

    async def look_up(self, reference: ModelReference) -> ServedVersion:
        """
        Return the version that a reference leads to, in any state. It is not used: what is evicted stays so.

        Raises NotFoundError, NotServedHereError.
        """
        try:
            return self._served.look_up(reference)
        except NotHeldError:
            raise await self._not_held(reference) from None

    async def _not_held(self, reference: ModelReference) -> NotServedHereError:
        await self._registry.check_registered(reference)
        return NotServedHereError(
            f"{reference} is registered but not served by this worker. Ask one of another pool.", field="model"
        )

    @asynccontextmanager
    async def _text_model(self, reference: ModelReference, task: Task) -> AsyncIterator[tuple[VersionKey, TextModel]]:
        async with self.held(reference) as (version, model):
            if model.manifest.task is not task or not isinstance(model, TextModel):
                raise _wrong_task(version, model.manifest.task, task)
            yield version, model

    async def _tokens(
        self,
        version: VersionKey,
        model: TextModel,
        text: TextInput,
        deadline: float,
        *,
        query: str | None = None,
        with_offsets: bool = False,
    ) -> Tokens:
        """Return the windows to run: from the tokenizer service, or as the caller sent them."""
        if text.tokens is not None:
            check_token_ids(text.tokens, model.max_tokens, model.vocabulary_size, model.type_count)
            self._limits.check_count(len(text.tokens.lengths), "sequences", field="token_ids")
            return text.tokens
        field = "texts" if query is None else "documents"
        self._limits.check_texts(text.texts, field=field)
        options = TokenizeOptions(
            tokenizer_digest=self.bundle(version).tokenizer_digest or "",
            max_tokens=model.max_tokens,
            truncation=text.truncation,
            stride=text.stride,
            with_offsets=with_offsets,
            control_tokens_as_text=model.manifest.control_tokens_as_text,
        )
        started = time.monotonic()
        try:
            if query is None:
                tokens = await self._tokenization.tokenize(options, text.texts, deadline=deadline)
            else:
                queries = [query] * len(text.texts)
                tokens = await self._tokenization.tokenize(options, queries, pairs=text.texts, deadline=deadline)
        except ModelfleetError as error:
            # The engine counts what it runs; a version whose tokenizer fails never comes as far as that.
            if not isinstance(error, _NO_FAULT_OF_THE_VERSION):
                model.record.failure(time.monotonic() - started, fault=True)
            if query is not None and isinstance(error, InvalidInputError):
                raise of_documents(error) from error.__cause__
            raise
        metrics.observe_tokenizing(started)
        _require_tokens(tokens, field)
        row_faults.check_vocabulary(tokens, model.vocabulary_size, field)
        return tokens

    def bundle(self, version: VersionKey) -> Bundle:
        """Return the bundle of a version that is held."""
        held = self._served.get(version)
        assert held
        return held.assigned.bundle

    async def _run(self, model: TextModel, tokens: Tokens, deadline: float, field: str) -> list[Floats]:
        try:
            return await self._engine.submit(model, tokens, tokens.lengths.tolist(), deadline=deadline)
        except RowsFailedError as failed:
            raise row_faults.of_texts(failed.errors, tokens, field) from failed.first.__cause__


def _prompted(text: TextInput, prompt: str, version: VersionKey) -> TextInput:
    if not prompt or text.tokens is not None:
        return text
    if text.stride is not None or text.truncation is Truncation.LEFT:
        field = "truncation" if text.stride is None else "windowing"
        raise InvalidInputError(
            f"{version} puts a prompt before each text, which {field} would take away. Cut texts from the right.",
            field=field,
        )
    return replace(text, texts=[prompt + one if one else one for one in text.texts])


def _entities(
    texts: Sequence[str],
    tokens: Tokens,
    rows: Sequence[Floats],
    read: Callable[[str, Sequence[LabelledWindow]], list[entities.Entity]],
) -> list[list[entities.Entity]]:
    assert tokens.offsets is not None
    labelled = [
        LabelledWindow(row, tokens.offsets[start : start + len(row)])
        for row, start in zip(rows, tokens.starts.tolist(), strict=False)
    ]
    firsts = windows.first_windows(tokens.window_counts).tolist()
    return [
        read(text, labelled[first : first + count])
        for text, first, count in zip(texts, firsts, tokens.window_counts.tolist(), strict=True)
    ]


def _require_tokens(tokens: Tokens, field: str) -> None:
    # A tokenizer that adds no special tokens may leave nothing of a text.
    if not tokens.lengths.all():
        name = f"{field}[{int(np.argmin(tokens.token_counts))}]"
        raise InvalidInputError(
            f"{name} has no tokens: the model's tokenizer drops all of its characters. Leave it out.", field=name
        )


def _wrong_task(version: VersionKey, has: Task, wanted: Task) -> WrongTaskError:
    return WrongTaskError(
        f"{version} is a model of the task {has.value!r}, not {wanted.value!r}. Call the RPC of its task.",
        field="model",
    )


def _require_dimensions(wanted: int, version: VersionKey, has: int | None) -> None:
    if has is not None and wanted > has:
        raise InvalidInputError(
            f"dimensions is {wanted}; {version} has {has}. Ask for 1 to {has}, or 0 for all.", field="dimensions"
        )


def _require_not_negative(field: str, value: int) -> None:
    if value < 0:
        raise InvalidInputError(f"{field} is {value}. Give 0 for all, or a positive number.", field=field)
