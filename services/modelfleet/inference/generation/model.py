"""A generative model as a worker holds it."""

from __future__ import annotations

import asyncio
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from modelfleet.bundle.manifest import Manifest
from modelfleet.inference.batching import BatchLimits
from modelfleet.inference.generation.options import Options
from modelfleet.inference.generation.sequences import Progress, Sequence
from modelfleet.inference.memory_budget import SessionMemory
from modelfleet.inference.session import Device, SessionOptions
from modelfleet.inference.statistics import ModelRecord
from modelfleet.runtime.errors import InvalidBundleError, ProviderUnavailableError

if TYPE_CHECKING:
    from modelfleet.inference.generation.decoding import Decoding

_STREAMS = {Device.CPU: 16, Device.CUDA: 64, Device.TENSORRT: 64}
_UNLIMITED = 1 << 40


@dataclass(frozen=True, slots=True)
class GenerationSettings:
    """What a worker gives one generative model: continuations at once (0 for the device's), cache, tokens that wait."""

    max_streams: int = 0
    cache_bytes: int = 2 << 30
    max_queue_tokens: int = 262_144


class GenerativeModel:
    """The opened model; `start` begins to generate, `close` ends it. `limits` tells of its context's length."""

    def __init__(
        self, name: str, manifest: Manifest, directory: Path, options: SessionOptions, settings: GenerationSettings
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
        self.session = open_genai(directory, options)
        self.max_streams = manifest.max_streams or settings.max_streams or _STREAMS[options.device]
        if self.session.paged:
            self.max_streams = min(self.max_streams, self.session.batch_rows)
        self.limits = BatchLimits(max_tokens=self.context, min_fill=1, free_tokens=0)
        self.record = ModelRecord()
        self.memory = SessionMemory()
        self.canary = None
        self.unwatched = "not watched: no canary asks generative models"
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

    def start(self) -> None:
        """Begin, in the running event loop."""
        from modelfleet.inference.generation.decoding import Decoding, DecodingLimits  # noqa: PLC0415  as above

        limits = DecodingLimits(self.max_streams, self.cache_tokens, self._max_queue_tokens)
        self._decoding = Decoding(self.name, self.session, limits, self.record)

    async def warm_up(self) -> None:
        """Generate from one token, so that no caller pays for first-time work. Raises InvalidBundleError."""
        ended: asyncio.Future[Progress] = asyncio.get_running_loop().create_future()

        def emit(progress: Progress) -> None:
            if (progress.finish or progress.error) and not ended.done():
                ended.set_result(progress)

        prompt = np.array([self.manifest.pad_token_id], np.int32)
        sequence = Sequence(prompt, 2, Options(), None, "", time.monotonic(), math.inf, emit, probe=True)
        self.decoding.submit([sequence])
        try:
            if error := (await ended).error:
                raise InvalidBundleError(f"The model generates nothing: {error.__cause__ or error}", field="model")
        finally:
            self.decoding.cancel([sequence])

    async def close(self) -> None:
        """End what still runs."""
        if self._decoding:
            await self._decoding.close()
            self._decoding = None
