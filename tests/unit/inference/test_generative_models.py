import asyncio
import gc
import threading
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness.tiny_generator import CONTEXT, spoken, write_tiny_generator
from modelfleet.bundle.directory import open_directory
from modelfleet.inference.generation import decoding
from modelfleet.inference.generation.lanes import EngineLane
from modelfleet.inference.generation.model import GenerationSettings, GenerativeModel
from modelfleet.inference.generation.proving import continued, prove
from modelfleet.inference.memory_budget import MemoryLeft
from modelfleet.inference.session import Device, SessionOptions
from modelfleet.runtime.errors import InsufficientMemoryError, InvalidBundleError, ModelLoadingError

SCRIPT = [40, 50, 60, 70, 80]
BYTES_A_TOKEN = 64


def load(directory: Path, settings: GenerationSettings = GenerationSettings(), **manifest: Any) -> GenerativeModel:  # noqa: B008  it is frozen
    folder = write_tiny_generator(directory / "model", SCRIPT, **manifest)
    bundle, _ = open_directory(folder)
    options = SessionOptions(
        device=Device.CPU, device_id=0, threads=1, device_memory_bytes=0, engine_cache=directory / "engines"
    )
    return GenerativeModel("m@1", bundle.manifest, folder, options, settings)


async def test_what_is_closed_is_freed_at_once(tmp_path: Path) -> None:
    model = load(tmp_path)
    opened = weakref.ref(model.session.model)
    model.start(print)
    await prove(model, ())
    assert (await continued(model, np.array([5], np.int32), 3))[0] == spoken(SCRIPT, [5], 3)
    gc.disable()
    try:
        await model.close()
        del model

        assert opened() is None
    finally:
        gc.enable()


async def test_a_step_that_never_ends_does_not_hold_up_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    under_way, go_on = threading.Event(), threading.Event()

    def stuck(_: EngineLane) -> Any:
        under_way.set()
        go_on.wait()
        return []

    monkeypatch.setattr(EngineLane, "step", stuck)
    monkeypatch.setattr(decoding, "_CLOSE_S", 0.05)
    model = load(tmp_path)
    model.start(print)
    asked = asyncio.create_task(continued(model, np.array([5], np.int32), 3))
    await asyncio.to_thread(under_way.wait)

    await model.close()

    go_on.set()
    with pytest.raises(ModelLoadingError, match="is being unloaded"):
        await asked


async def test_the_cache_takes_no_more_memory_than_is_left(tmp_path: Path) -> None:
    model = load(tmp_path)
    model.fit_cache(MemoryLeft(host=1 << 50, device=None))
    assert model.cache_tokens == (2 << 30) // BYTES_A_TOKEN  # as it is set

    model.fit_cache(MemoryLeft(host=1000 * BYTES_A_TOKEN, device=None))
    assert model.cache_tokens == 750

    with pytest.raises(
        InsufficientMemoryError, match=r"m@1 needs 64 bytes .* room for 300 .*; 512 is the least"
    ) as refused:
        model.fit_cache(MemoryLeft(host=1 << 50, device=400 * BYTES_A_TOKEN))
    makes_way = MemoryLeft(host=1 << 50, device=400 * BYTES_A_TOKEN + refused.value.missing_device_bytes)
    model.fit_cache(makes_way)
    assert model.cache_tokens == 512


def test_a_manifest_promises_no_more_context_than_the_graph_has(tmp_path: Path) -> None:
    with pytest.raises(InvalidBundleError, match=f"max_tokens is {CONTEXT + 1}; by genai_config.json .* {CONTEXT}"):
        load(tmp_path, max_tokens=CONTEXT + 1)


async def test_a_model_is_proved_within_whatever_limits(tmp_path: Path) -> None:
    for max_tokens, settings in ((2, GenerationSettings()), (CONTEXT, GenerationSettings(1, 3 * BYTES_A_TOKEN, 1))):
        model = load(tmp_path, settings, max_tokens=max_tokens)
        model.start(print)
        try:
            await prove(model, ())
        finally:
            await model.close()
