"""A Kubernetes API over real HTTP: lists and watches with versions, scale, evictions, RBAC, and failures."""

import asyncio
import json
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from aiohttp import web

NAMESPACE = "ml"
_GROUPS = {"/api/v1": "", "/apis/apps/v1": "apps"}
_VERBS = {"GET": "list", "PATCH": "patch", "POST": "create"}

Json = dict[str, Any]


@dataclass(frozen=True)
class Call:
    """A request as RBAC sees it."""

    verb: str
    group: str
    resource: str


@dataclass
class Failure:
    """An answer instead of the real one."""

    status: int
    text: str = '{"kind": "Status", "message": "as told by the test"}'
    headers: Mapping[str, str] = field(default_factory=dict)


class KubernetesApi:
    """One namespace's Deployments and pods. `rules` are those of a Role; what they do not allow is answered 403."""

    def __init__(self, rules: Sequence[Mapping[str, Any]] | None = None) -> None:
        self.rules = rules
        self.calls: list[Call] = []
        self.failures: dict[str, deque[Failure]] = {}
        self.watches = 0
        self._objects: dict[str, dict[str, Json]] = {"deployments": {}, "pods": {}}
        self._events: list[tuple[int, str, Json]] = []
        self._version = 100
        self._forgotten = 0
        self._changed = asyncio.Condition()
        self._cut = 0
        self._runner: web.AppRunner | None = None
        self.port = 0

    async def start(self) -> None:
        """Listen, on the same port as before when it was stopped."""
        application = web.Application()
        application.router.add_route("*", "/{path:.*}", self._answer)
        self._runner = web.AppRunner(application, shutdown_timeout=0)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port, reuse_address=True)
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        """Stop listening and break off every watch."""
        assert self._runner
        await self.break_watches()
        await self._runner.cleanup()

    async def put(self, resource: str, found: Json) -> None:
        """Create or change an object."""
        objects = self._objects[resource]
        kind = "MODIFIED" if found["metadata"]["name"] in objects else "ADDED"
        objects[found["metadata"]["name"]] = found
        await self._tell(kind, resource, found)

    async def delete(self, resource: str, name: str) -> None:
        """Delete an object."""
        await self._tell("DELETED", resource, self._objects[resource].pop(name))

    async def change_unnoticed(self, resource: str, found: Json) -> None:
        """Change an object without an event, as lost with a watch that broke."""
        self._objects[resource][found["metadata"]["name"]] = found

    async def forget(self) -> None:
        """Forget all versions so far: watches from them are answered 410 Gone, as after compaction."""
        self._version += 1
        self._forgotten = self._version
        self._events.clear()

    async def break_watches(self) -> None:
        """End every open watch."""
        async with self._changed:
            self._cut += 1
            self._changed.notify_all()

    def fail(self, call: str, *failures: Failure) -> None:
        """Answer the next calls, such as "watch pods", with failures."""
        self.failures.setdefault(call, deque()).extend(failures)

    def seen(self, verb: str, resource: str) -> int:
        """Return how often a call was made."""
        return sum((call.verb, call.resource) == (verb, resource) for call in self.calls)

    async def called(self, verb: str, resource: str) -> None:
        """Return once a call was made."""
        async with asyncio.timeout(10), self._changed:
            await self._changed.wait_for(lambda: self.seen(verb, resource))

    async def _tell(self, kind: str, resource: str, found: Json) -> None:
        async with self._changed:
            self._version += 1
            copy = json.loads(json.dumps(found))
            copy["metadata"]["resourceVersion"] = str(self._version)
            self._events.append((self._version, resource, {"type": kind, "object": copy}))
            self._changed.notify_all()

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        prefix, _, path = request.path.partition("/namespaces/")
        namespace, resource, *rest = path.split("/")
        if prefix not in _GROUPS or namespace != NAMESPACE:
            return _status(404, f"no {request.path} here")
        subresource = "/".join([resource, *rest[1:]])
        watching = request.query.get("watch") in ("true", "True")
        verb = "watch" if watching else _VERBS[request.method]
        call = Call(verb, _GROUPS[prefix], subresource)
        async with self._changed:
            self.calls.append(call)
            self._changed.notify_all()
        if failures := self.failures.get(f"{verb} {subresource}"):
            failure = failures.popleft()
            return web.Response(status=failure.status, text=failure.text, headers=failure.headers)
        if not self._allowed(call):
            return _status(403, f"cannot {verb} {subresource}")
        if verb == "list":
            return web.json_response(self._list(resource, request.query.get("labelSelector", "")))
        if verb == "watch":
            return await self._watch(request, resource)
        return await self._change(subresource, rest[0], await request.json())

    def _allowed(self, call: Call) -> bool:
        return self.rules is None or any(
            call.verb in rule["verbs"] and call.group in rule["apiGroups"] and call.resource in rule["resources"]
            for rule in self.rules
        )

    def _list(self, resource: str, selector: str) -> Json:
        items = [found for found in self._objects[resource].values() if _selected(found, selector)]
        return {"kind": "List", "metadata": {"resourceVersion": str(self._version)}, "items": items}

    async def _watch(self, request: web.Request, resource: str) -> web.StreamResponse:
        since, cut = int(request.query["resourceVersion"]), self._cut
        if since < self._forgotten:
            gone = {"code": 410, "reason": "Expired", "message": "too old resource version"}
            return web.json_response({"type": "ERROR", "object": gone})
        response = web.StreamResponse()
        await response.prepare(request)
        self.watches += 1
        try:
            async with asyncio.timeout(float(request.query["timeoutSeconds"])):
                while True:
                    async with self._changed:
                        await self._changed.wait_for(partial(self._is_news, since, cut))
                    if self._cut > cut:
                        break
                    selector = request.query.get("labelSelector", "")
                    for version, of, event in list(self._events):
                        if version > since and of == resource and _selected(event["object"], selector):
                            line = json.dumps(event).encode() + b"\n"
                            # In pieces, as networks deliver: a client must put lines together.
                            await response.write(line[: len(line) // 2])
                            await response.write(line[len(line) // 2 :])
                    since = self._version
        except TimeoutError:
            pass
        finally:
            self.watches -= 1
        return response

    def _is_news(self, since: int, cut: int) -> bool:
        return self._version > since or self._cut > cut

    async def _change(self, resource: str, name: str, body: Json) -> web.Response:
        if resource == "pods/eviction":
            await self.delete("pods", name)
            return _status(201, "")
        if name not in self._objects["deployments"]:
            return _status(404, f"deployments {name} not found")
        found = self._objects["deployments"][name]
        found["spec"]["replicas"] = body["spec"]["replicas"]
        await self._tell("MODIFIED", "deployments", found)
        scale = {"replicas": found["spec"]["replicas"]}
        return web.json_response(
            {"kind": "Scale", "apiVersion": "autoscaling/v1", "metadata": {"name": name}, "spec": scale}
        )


@asynccontextmanager
async def running_api(rules: Sequence[Mapping[str, Any]] | None = None) -> AsyncIterator[KubernetesApi]:
    """Serve until the block ends."""
    api = KubernetesApi(rules)
    await api.start()
    try:
        yield api
    finally:
        await api.stop()


def write_kubeconfig(path: Path, port: int) -> Path:
    """Write what leads clients to the API."""
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "test",
        "clusters": [{"name": "test", "cluster": {"server": f"http://127.0.0.1:{port}"}}],
        "users": [{"name": "test", "user": {}}],
        "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test", "namespace": NAMESPACE}}],
    }
    path.write_text(json.dumps(config))
    return path


def _selected(found: Json, selector: str) -> bool:
    wanted = dict(part.split("=") for part in selector.split(",") if part)
    return wanted.items() <= found["metadata"].get("labels", {}).items()


def _status(code: int, message: str) -> web.Response:
    return web.json_response({"kind": "Status", "code": code, "message": message}, status=code)
