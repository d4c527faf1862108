"""The kernel's figures, seen through a large allocation."""

import mmap
from pathlib import Path

import pytest
from modelfleet.runtime import memory

SIZE = 64 << 20


def touched_and_freed() -> None:
    with mmap.mmap(-1, SIZE) as block:
        for start in range(0, SIZE, mmap.PAGESIZE):
            block[start] = 1


def test_the_limit_is_the_cgroup_s_or_the_machine_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(memory, "_CGROUP_LIMITS", (limit,))
    whole = memory.available_memory()
    limit.write_text("max\n")
    assert memory.available_memory() == whole

    limit.write_text("123456789\n")

    assert memory.available_memory() == 123456789


def test_a_peak_is_remembered_until_it_is_reset() -> None:
    memory.reset_peak_memory()
    before = memory.resident_memory()

    touched_and_freed()

    assert memory.peak_memory() >= before + SIZE * 0.9
    memory.reset_peak_memory()
    assert memory.peak_memory() < before + SIZE / 2


def test_freed_memory_goes_back_to_the_system() -> None:
    # Small pieces come from the heap, which the C library does not shrink by itself below what is still used.
    pieces = [bytearray(1000) for _ in range(100_000)]
    last = bytearray(1000)
    held = memory.resident_memory()
    pieces.clear()

    memory.return_free_memory()

    assert memory.resident_memory() < held - 50_000_000
    assert last
