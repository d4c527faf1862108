"""A generative model as a worker holds it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelfleet.bundle.manifest import Manifest
from modelfleet.inference.batching import BatchLimits
from modelfleet.inference.memory_budget import MemoryLeft, SessionMemory
from modelfleet.inference.session import Device, SessionOptions
from modelfleet.inference.statistics import ModelRecord
from modelfleet.runtime.errors import (
    FatalDeviceError,
    InsufficientMemoryError,
    InvalidBundleError,
    ProviderUnavailableError,
)

if TYPE_CHECKING:
    from modelfleet.inference.canary import Canary
    from modelfleet.inference.generation.decoding import Decoding

_STREAMS = {Device.CPU: 16, Device.CUDA: 64, Device.TENSORRT: 64}
_UNLIMITED = 1 << 40
# Of the memory that is left: the rest is for what a step computes, and for other models' batches.
_CACHE_SHARE = 0.75
# With fewer tokens in the cache hardly a request would be answered.
_LEAST_CACHE_TOKENS = 512


@dataclass(frozen=True, slots=True)
class GenerationSettings:
    """What a worker gives one generative model: continuations at once (0 for the device's), cache, tokens that wait."""

    max_streams: int = 0
    cache_bytes: int = 2 << 30
    max_queue_tokens: int = 262_144


class GenerativeModel:
    """
    The opened model; `start` begins to generate, `close` ends it. `limits` tells of its context's length.

    `opened` is the library's model of another version with the same graph, which is shared.
    """

    def __init__(
        self,
        name: str,
        manifest: Manifest,
        directory: Path,
        options: SessionOptions,
        settings: GenerationSettings,
        *,
        opened: Any = None,
    ) -> None:
        try:
            # A worker of the extra [inference] alone has not got the library, and serves everything else.
            from modelfleet.inference.generation.genai import open_genai  # noqa: PLC0415
        except ImportError as error:
            raise ProviderUnavailableError(
                f"onnxruntime-genai is not there ({error}). Install modelfleet[generation] or [generation-gpu]."
            ) from error
        self.name = name
        self.manifest = manifest
        self.session = open_genai(directory, options, adapter=manifest.adapter, opened=opened)
        if self.context > self.session.context:
            raise InvalidBundleError(
                f"max_tokens is {self.context}; by genai_config.json the graph holds {self.session.context}. Lower it.",
                field="max_tokens",
            )
        self.max_streams = manifest.max_streams or settings.max_streams or _STREAMS[options.device]
        if self.session.paged:
            self.max_streams = min(self.max_streams, self.session.batch_rows)
        self.limits = BatchLimits(max_tokens=self.context, min_fill=1, free_tokens=0)
        self.record = ModelRecord()
        self.memory = SessionMemory()
        self.canary: Canary | None = None
        self.notes = ""
        # A paged engine sizes its cache itself and lets requests wait for room.
        self.cache_tokens = (
            _UNLIMITED if self.session.paged else settings.cache_bytes // self.session.cache_bytes_per_token
        )
        self._max_queue_tokens = settings.max_queue_tokens
        self._decoding: Decoding | None = None

    @property
    def context(self) -> int:
        """Most tokens of a prompt and its continuation together."""
        assert self.manifest.max_tokens
        return self.manifest.max_tokens

    @property
    def decoding(self) -> Decoding:
        """What continues sequences, between `start` and `close`."""
        assert self._decoding
        return self._decoding

    def fit_cache(self, left: MemoryLeft) -> None:
        """
        Let the cache take no more than there is room for, before `start`.

        Raises InsufficientMemoryError when that is too little to answer anything.
        """
        if self.session.paged:
            return
        memory, each = left.host if left.device is None else left.device, self.session.cache_bytes_per_token
        tokens = int(_CACHE_SHARE * memory) // each
        if tokens < (least := min(_LEAST_CACHE_TOKENS, self.context)):
            refusal = InsufficientMemoryError(
                f"{self.name} needs {each} bytes of memory for a token in its cache, and there is room for "
                f"{max(0, tokens)} on this worker; {least} is the least. "
                "Assign fewer versions to it, or give it more memory."
            )
            missing = math.ceil(least * each / _CACHE_SHARE) - memory
            if left.device is None:
                refusal.missing_host_bytes = missing
            else:
                refusal.missing_device_bytes = missing
            raise refusal
        self.cache_tokens = min(self.cache_tokens, tokens)

    def start(self, failed: Callable[[FatalDeviceError], None]) -> None:
        """Begin, in the running event loop; `failed` is called there when nothing is generated any more."""
        from modelfleet.inference.generation.decoding import Decoding, DecodingLimits  # noqa: PLC0415  as above

        limits = DecodingLimits(self.max_streams, self.cache_tokens, self._max_queue_tokens)
        self._decoding = Decoding(self.name, self.session, limits, self.record, failed)

    async def close(self) -> None:
        """End what still runs."""
        if self._decoding:
            await self._decoding.close()
            self._decoding = None
