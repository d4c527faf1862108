import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from modelfleet.inference.generation.detokenization import Detokenization
from modelfleet.runtime.errors import DeadlineExpiredError, InvalidInputError, TokenizerUnreachableError


@dataclass
class Spelling:
    """Decodes ids to letters. `failures` are raised first; a call waits for `gate`."""

    failures: list[Exception] = field(default_factory=list)
    calls: list[int] = field(default_factory=list)
    gate: asyncio.Event = field(default_factory=asyncio.Event)

    async def detokenize(self, _digest: str, sequences: Sequence[Sequence[int]], _timeout_s: float) -> list[str]:
        self.calls.append(len(sequences))
        await self.gate.wait()
        if self.failures:
            raise self.failures.pop(0)
        return ["".join(chr(id_) for id_ in ids) for ids in sequences]


@pytest.fixture
def spelling() -> Spelling:
    spelling = Spelling()
    spelling.gate.set()
    return spelling


async def test_streams_that_come_while_a_call_is_in_flight_share_the_next(spelling: Spelling) -> None:
    spelling.gate.clear()
    detokenization = Detokenization(spelling, pace_s=0)
    first = asyncio.create_task(detokenization.decode("d", [[97]], tokens=1))
    while not spelling.calls:  # noqa: ASYNC110  the call sets no event
        await asyncio.sleep(0)
    others = [asyncio.create_task(detokenization.decode("d", [[98], [98, 99 + n]], tokens=1)) for n in range(8)]
    await asyncio.sleep(0)
    spelling.gate.set()

    assert await first == ["a"]
    assert await asyncio.gather(*others) == [["b", "b" + chr(99 + n)] for n in range(8)]
    assert spelling.calls == [1, 16]


async def test_however_fast_streams_run_there_is_one_call_in_each_pause(spelling: Spelling) -> None:
    detokenization = Detokenization(spelling, pace_s=0.05)
    loop = asyncio.get_running_loop()
    end = loop.time() + 0.5

    async def stream() -> int:
        count = 0
        while loop.time() < end:
            await detokenization.decode("d", [[97]], tokens=1)
            count += 1
        return count

    counts = await asyncio.gather(*(stream() for _ in range(20)))

    assert len(spelling.calls) <= 0.5 / 0.05 + 2
    assert min(counts) > 2


async def test_a_service_that_is_away_for_a_moment_costs_nothing_but_time(spelling: Spelling) -> None:
    spelling.failures = [TokenizerUnreachableError("away"), TokenizerUnreachableError("away")]

    assert await Detokenization(spelling).decode("d", [[97]], tokens=1) == ["a"]


async def test_a_service_that_is_stuck_is_no_fault_of_the_callers_deadline(spelling: Spelling) -> None:
    spelling.failures = [DeadlineExpiredError("too late")]
    assert await Detokenization(spelling).decode("d", [[97]], tokens=1) == ["a"]

    spelling.failures = [DeadlineExpiredError("too late") for _ in range(4)]
    with pytest.raises(TokenizerUnreachableError, match="did not answer within 5 s, 4 times"):
        await Detokenization(spelling).decode("d", [[97]], tokens=1)


async def test_an_error_reaches_those_who_wait_and_the_next_call_is_made(spelling: Spelling) -> None:
    spelling.failures = [InvalidInputError("no")]
    detokenization = Detokenization(spelling)

    with pytest.raises(InvalidInputError, match="no"):
        await detokenization.decode("d", [[97]], tokens=1)

    assert await detokenization.decode("d", [[97]], tokens=1) == ["a"]
