"""A copy of some objects of the Kubernetes API: listed, watched, listed again, whatever happens in between."""

import asyncio
import json
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Any, TypeAlias

import aiohttp
import structlog
from kubernetes.aio.client import ApiException

_FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 30.0
_STEADY_S = 10.0  # a watch that lasts this long starts the pauses anew

_log = structlog.get_logger()


# An object as the API sends it. The client's classes would check what this code never reads, and refuse an object for
# a value that a newer API has.
ApiObject: TypeAlias = Mapping[str, Any]


class Reflector:
    """
    Keeps `objects`, by name, in step with the API while `run` runs.

    `call` lists, or with `watch=True` opens a watch; it returns the response unread.
    A watch ends after `resync_s` seconds and everything is listed again, which also heals what was missed unnoticed.
    """

    def __init__(
        self,
        what: str,
        call: Callable[..., Awaitable[Any]],
        *,
        resync_s: float = 300,
        longest_pause_s: float = _LONGEST_PAUSE_S,
    ) -> None:
        self._what = what
        self._call = call
        self._resync_s = resync_s
        self._longest_pause_s = longest_pause_s
        self._watching = False
        self._last_in_step: datetime | None = None
        self.objects: dict[str, ApiObject] = {}
        self.problem = ""
        """Why the last list or watch ended, empty when it ended as it should."""

    @property
    def observe_time(self) -> datetime | None:
        """When the copy was last known to be in step: now while watched, None before the first list."""
        return datetime.now(UTC) if self._watching else self._last_in_step

    async def run(self) -> None:
        """List and watch until cancelled."""
        failures = 0
        loop = asyncio.get_running_loop()
        while True:
            began = loop.time()
            least_pause_s = 0.0
            problem = ""
            try:
                await self._list_and_watch()
            except ApiException as error:
                least_pause_s = retry_after_s(error)
                problem = f"{error.status} to a request for {self._what}"
                # 410 Gone: the version to watch from is forgotten. Listing again is all there is to do.
                level = _log.info if error.status == HTTPStatus.GONE else _log.warning
                level("watch refused", what=self._what, status=error.status, reason=error.reason)
            except (aiohttp.ClientError, OSError, TimeoutError, ValueError, KeyError, TypeError) as error:
                problem = repr(error)
                _log.warning("watch lost", what=self._what, error=problem)
            self.problem = problem
            if self._watching:
                self._watching, self._last_in_step = False, datetime.now(UTC)
            failures = 1 if loop.time() - began > _STEADY_S else failures + 1
            await asyncio.sleep(max(pause_s(failures, self._longest_pause_s), least_pause_s))

    async def _list_and_watch(self) -> None:
        async with await self._call(_request_timeout=30.0) as response:
            listed = json.loads(await _body(response))
        # One assignment: readers see the old copy or the new one.
        self.objects = {item["metadata"]["name"]: item for item in listed["items"] or ()}
        self._last_in_step = datetime.now(UTC)
        version = listed["metadata"]["resourceVersion"]
        seconds = int(self._resync_s * random.uniform(0.9, 1.1)) or 1  # noqa: S311  spreads, no secret
        async with await self._call(
            watch=True,
            resource_version=version,
            allow_watch_bookmarks=True,
            timeout_seconds=seconds,
            _request_timeout=seconds + 15.0,  # for a server that vanished without a word
        ) as response:
            await _check(response)
            self._watching = True
            async for line in _lines(response):
                self._apply(json.loads(line))

    def _apply(self, event: dict[str, Any]) -> None:
        found = event["object"]
        match event["type"]:
            case "ADDED" | "MODIFIED":
                self.objects = {**self.objects, found["metadata"]["name"]: found}
            case "DELETED":
                gone = found["metadata"]["name"]
                self.objects = {name: item for name, item in self.objects.items() if name != gone}
            case "ERROR":
                raise ApiException(status=found.get("code"), reason=found.get("message"))


def pause_s(failures: int, longest_s: float) -> float:
    """Return how long to wait after so many failures in a row, at least one: twice as long each time, with jitter."""
    doublings = min(failures - 1, 20)  # an API may be away for days
    return min(_FIRST_PAUSE_S * (1 << doublings), longest_s) * random.uniform(0.8, 1.2)  # noqa: S311  spreads, no secret


def retry_after_s(error: ApiException) -> float:
    """Return the pause that the API asks for with 429 or 503, else 0."""
    value = (error.headers or {}).get("Retry-After", "")
    return float(value) if value.isdigit() else 0.0


async def _check(response: aiohttp.ClientResponse) -> None:
    if response.status != HTTPStatus.OK:
        error = ApiException(status=response.status, reason=(await response.text())[:500])
        error.headers = response.headers
        raise error


async def _body(response: aiohttp.ClientResponse) -> bytes:
    await _check(response)
    return await response.read()


async def _lines(response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    """Yield whole lines. The stream's own readline gives up at 128 KiB, and a pod may be larger."""
    rest = b""
    async for chunk in response.content.iter_any():
        *whole, rest = (rest + chunk).split(b"\n")
        for line in whole:
            if line:
                yield line
