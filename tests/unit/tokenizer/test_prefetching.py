import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator

import pytest
from modelfleet.runtime.errors import InvalidBundleError, ManagerUnreachableError
from modelfleet.tokenizer import prefetching
from modelfleet.tokenizer.prefetching import Kind, NeededFile, Prefetching

A, B, C = (NeededFile(Kind.TOKENIZER, letter * 64) for letter in "abc")


class Place:
    """Where files are to be: fetches them, unless told otherwise, and says what was asked for."""

    def __init__(self) -> None:
        self.snapshots: asyncio.Queue[frozenset[NeededFile] | None] = asyncio.Queue()
        self.asked: Counter[NeededFile] = Counter()
        self.held: set[NeededFile] = set()
        self.left: set[NeededFile] = set()
        self.stuck: set[NeededFile] = set()
        self.failures: dict[NeededFile, list[Exception]] = {}
        self._changed = asyncio.Condition()

    async def needed(self) -> AsyncIterator[frozenset[NeededFile] | None]:
        while True:
            yield await self.snapshots.get()

    async def hold(self, file: NeededFile) -> None:
        self.asked[file] += 1
        try:
            if file in self.stuck:
                await asyncio.Event().wait()
            if failures := self.failures.get(file):
                raise failures.pop(0)
            self.held.add(file)
        except asyncio.CancelledError:
            self.left.add(file)
            raise
        finally:
            asyncio.get_running_loop().create_task(self._tell())

    async def _tell(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    async def until(self, *, held: set[NeededFile] = frozenset(), left: set[NeededFile] = frozenset()) -> None:
        async with asyncio.timeout(5), self._changed:
            await self._changed.wait_for(lambda: held <= self.held and left <= self.left)


@contextlib.asynccontextmanager
async def following(place: Place) -> AsyncIterator[Prefetching]:
    following = Prefetching(place.needed, place.hold)
    task = asyncio.create_task(following.run())
    try:
        yield following
    finally:
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


async def settled(prefetching: Prefetching) -> None:
    async with asyncio.timeout(5):
        await prefetching.settled.wait()


async def test_all_that_is_needed_is_held_and_nothing_is_asked_for_twice() -> None:
    place = Place()
    async with following(place) as prefetching:
        place.snapshots.put_nowait(frozenset({A, B}))
        await settled(prefetching)
        assert place.held == {A, B}

        place.snapshots.put_nowait(frozenset({A, B, C}))
        await place.until(held={C})

    assert place.asked == {A: 1, B: 1, C: 1}


async def test_nothing_to_hold_is_settled() -> None:
    place = Place()
    async with following(place) as prefetching:
        place.snapshots.put_nowait(frozenset())
        await settled(prefetching)


async def test_a_file_on_its_way_does_not_delay_the_next_snapshot_and_is_left_when_no_longer_needed() -> None:
    place = Place()
    place.stuck = {A}
    async with following(place) as prefetching:
        place.snapshots.put_nowait(frozenset({A, B}))
        await place.until(held={B})
        assert not prefetching.settled.is_set()

        place.snapshots.put_nowait(frozenset({B, C}))
        await place.until(held={B, C}, left={A})
        await settled(prefetching)


async def test_a_file_that_was_not_needed_for_a_while_is_asked_for_again() -> None:
    place = Place()
    async with following(place):
        place.snapshots.put_nowait(frozenset({A}))
        await place.until(held={A})
        place.held.clear()
        for needed in (frozenset(), frozenset({A})):
            place.snapshots.put_nowait(needed)
        await place.until(held={A})

    assert place.asked[A] == 2


async def test_without_a_manager_it_is_settled_and_goes_on_with_the_next_snapshot() -> None:
    place = Place()
    async with following(place) as prefetching:
        place.snapshots.put_nowait(None)
        await settled(prefetching)

        place.snapshots.put_nowait(frozenset({A}))
        await place.until(held={A})


async def test_while_the_manager_is_away_a_file_is_asked_for_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefetching, "_FIRST_RETRY_S", 0.001)
    place = Place()
    place.failures[A] = [ManagerUnreachableError("away"), ManagerUnreachableError("away")]
    async with following(place):
        place.snapshots.put_nowait(frozenset({A}))
        await place.until(held={A})

    assert place.asked[A] == 3


@pytest.mark.parametrize("fault", [InvalidBundleError("no tokenizer"), RuntimeError("unforeseen")])
async def test_a_file_that_cannot_be_used_is_not_asked_for_again_and_keeps_no_other_from_coming(
    fault: Exception,
) -> None:
    place = Place()
    place.failures[A] = [fault]
    async with following(place) as following_:
        place.snapshots.put_nowait(frozenset({A, B}))
        await settled(following_)
        place.snapshots.put_nowait(frozenset({A, B, C}))
        await place.until(held={B, C})

    assert place.asked[A] == 1
