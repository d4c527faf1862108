"""From chat messages to the prompt that a model was trained on, by its own template, within bounds."""

import asyncio
import contextlib
import json
import math
import sys
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import structlog

from modelfleet.runtime.errors import InvalidBundleError, InvalidInputError, SessionFailureError, quoted
from modelfleet.tokenizer.control_tokens import Spellings, marked

_log = structlog.get_logger()

ROLES = ("system", "user", "assistant", "tool")

_KEPT_TEMPLATES = 64
_MOST_TEMPLATE_BYTES = 1 << 20
_MOST_ANSWER_BYTES = 32 << 20
_START_S = 10.0
# A template that does not end is refused for so long before it may try again: the machine may have been at fault.
_REFUSED_S = 60.0


@dataclass(frozen=True, slots=True)
class Message:
    """A turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class ChatValues:
    """What a caller gives a template besides messages: variables by name, and descriptions of tools."""

    variables: Mapping[str, Any]
    tools: Sequence[Any] | None = None

    def values(self) -> dict[str, Any]:
        """Return all by the names that templates have for them."""
        return {**self.variables, **({} if self.tools is None else {"tools": self.tools})}


NO_VALUES = ChatValues({})
_RESERVED = frozenset({"messages", "tools", "add_generation_prompt"})


def parse_values(variables_json: str, tools_json: str) -> ChatValues:
    """Read what a caller gives as JSON, nothing where that is empty. Raises InvalidInputError for anything else."""
    variables = _json(variables_json, dict, "template_variables_json", "an object") or {}
    tools = _json(tools_json, list, "tools_json", "an array of objects")
    for name in variables:
        if name in _RESERVED or name.endswith("_token") or not name.isidentifier():
            raise InvalidInputError(
                f"template_variables_json has {quoted(name)}, which is not for callers to set. Leave it out.",
                field="template_variables_json",
            )
    if tools is not None and not all(isinstance(tool, dict) for tool in tools):
        raise InvalidInputError("tools_json has a tool that is not an object. Correct it.", field="tools_json")
    return ChatValues(variables, tools)


def _json(text: str, kind: type, field: str, said: str) -> Any:
    if not text:
        return None
    try:
        value = json.loads(text)
    except ValueError as error:
        raise InvalidInputError(f"{field} is not JSON: {error}. Give {said}.", field=field) from None
    if not isinstance(value, kind):
        raise InvalidInputError(f"{field} is not {said}. Give that.", field=field)
    return value


def _marked(value: Any, found: Spellings) -> Any:
    if isinstance(value, str):
        return marked(value, found)
    if isinstance(value, Mapping):
        return {marked(key, found): _marked(one, found) for key, one in value.items()}
    return [_marked(one, found) for one in value] if isinstance(value, list) else value


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """A Jinja template, and what it calls by name besides the messages."""

    source: str
    special_tokens: Mapping[str, str]


def parse_template(digest: str, content: bytes) -> ChatTemplate:
    """
    Read a template's file: Jinja itself, or a `tokenizer_config.json` that holds it.

    Raises InvalidBundleError for a file that is neither.
    """
    if len(content) > _MOST_TEMPLATE_BYTES:
        raise InvalidBundleError(
            f"The chat template {digest} has {len(content)} bytes, more than a megabyte.", field="template_digest"
        )
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise InvalidBundleError(
            f"The chat template {digest} is not UTF-8 at byte {error.start}.", field="template_digest"
        ) from error
    try:
        config = json.loads(text)
    except ValueError:
        return ChatTemplate(text, {})
    template = config.get("chat_template") if isinstance(config, dict) else None
    if isinstance(template, list):  # several by name
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    if not isinstance(template, str):
        raise InvalidBundleError(
            f"The file {digest} has no chat_template. Add one to the model and push it again.", field="template_digest"
        )
    tokens = {key: value for key, value in config.items() if key.endswith("_token") and isinstance(value, str)}
    return ChatTemplate(template, tokens)


def check_messages(messages: Sequence[Message], max_bytes: int) -> None:
    """Raise InvalidInputError for no messages, for roles that are none, and for more text than `max_bytes`."""
    if not messages:
        raise InvalidInputError("messages is empty. Give at least one.", field="messages")
    for index, message in enumerate(messages):
        if message.role not in ROLES:
            raise InvalidInputError(
                f"messages[{index}].role is {quoted(message.role)}. Use one of {', '.join(ROLES)}.", field="messages"
            )
    size = sum(len(message.content.encode()) for message in messages)
    if size > max_bytes:
        raise InvalidInputError(
            f"The messages have {size} bytes; together they may have {max_bytes}. Send fewer.", field="messages"
        )


class Chats:
    """
    Renders templates, which `fetch` returns by digest, in a process of their own; `timeout_s` bounds each rendering.

    A template that is not done in time with a single word either is refused for a while, so that it costs no more.
    """

    def __init__(
        self, fetch: Callable[[str], Awaitable[bytes]], timeout_s: float = 1.0, max_bytes: int = 4 << 20
    ) -> None:
        self._fetch = fetch
        self._timeout_s = timeout_s
        self._max_bytes = max_bytes
        self._templates: OrderedDict[str, ChatTemplate] = OrderedDict()
        self._refused_until: dict[str, float] = {}
        self._rendering: set[asyncio.Task[str]] = set()
        self._process: asyncio.subprocess.Process | None = None
        self._turn = asyncio.Lock()

    async def render(
        self,
        digest: str,
        messages: Sequence[Message],
        special_tokens: Mapping[str, str],
        *,
        open_answer: bool,
        more: ChatValues = NO_VALUES,
        found: Spellings = None,
    ) -> str:
        """
        Return the prompt; `open_answer` ends it with the beginning of the assistant's turn.

        It has a mark in each control token that `found` finds in a content or a value: no caller's text opens a turn.
        Raises InvalidInputError when the template refuses the messages, and InvalidBundleError when it fails.
        """
        check_messages(messages, self._max_bytes)
        template = await self._template(digest)
        values = {
            **template.special_tokens,
            **special_tokens,
            "messages": [{"role": message.role, "content": marked(message.content, found)} for message in messages],
            "add_generation_prompt": open_answer,
            **_marked(more.values(), found),
        }
        # A caller that leaves in the middle would leave its answer to the next. It is bounded, and awaited without it.
        rendering = asyncio.create_task(self._rendered(digest, template, values, sorted(more.values())))
        self._rendering.add(rendering)
        rendering.add_done_callback(self._ended)
        return await asyncio.shield(rendering)

    def _ended(self, rendering: asyncio.Task[str]) -> None:
        self._rendering.discard(rendering)
        if not rendering.cancelled():
            rendering.exception()  # where the caller has left, nobody else asks for it

    async def _rendered(
        self, digest: str, template: ChatTemplate, values: Mapping[str, Any], more: Sequence[str]
    ) -> str:
        async with self._turn:
            self._check_not_refused(digest)  # it may have been found out while this one waited for its turn
            request = {"template": template.source, "values": values, "read": list(more)}
            try:
                answer = await self._ask(request)
            except TimeoutError:
                await self._check_ends(digest, template, values)
                answer = await self._ask_again(request)
        if "unread" in answer:
            raise InvalidInputError(
                f"The model's chat template does not read {answer['unread']!r}, which was given. Leave it out.",
                field="tools" if answer["unread"] == "tools" else "template_variables",
            )
        if "refused" in answer:
            raise InvalidInputError(
                f"The model's chat template refuses these messages: {answer['refused']}", field="messages"
            )
        if "broken" in answer:
            raise InvalidBundleError(
                f"The model's chat template {digest} fails: {answer['broken']}. Correct it and push the model again.",
                field="template_digest",
            )
        return answer["text"]

    async def close(self) -> None:
        """End the process."""
        for rendering in self._rendering:
            rendering.cancel()
        await asyncio.gather(*self._rendering, return_exceptions=True)
        if self._process:
            await self._kill(self._process)

    async def _template(self, digest: str) -> ChatTemplate:
        self._check_not_refused(digest)
        if digest not in self._templates:
            self._templates[digest] = parse_template(digest, await self._fetch(digest))
            if len(self._templates) > _KEPT_TEMPLATES:
                self._templates.popitem(last=False)
        self._templates.move_to_end(digest)
        return self._templates[digest]

    def _check_not_refused(self, digest: str) -> None:
        if time.monotonic() < self._refused_until.get(digest, -math.inf):
            raise InvalidBundleError(
                f"The model's chat template {digest} did not end within {self._timeout_s:g} s: it may loop for ever. "
                "Correct it and push the model again.",
                field="template_digest",
            )

    async def _check_ends(self, digest: str, template: ChatTemplate, values: Mapping[str, Any]) -> None:
        """Refuse a template from now on that is not done in time with one word: what was sent was not to blame."""
        word = {**values, "messages": [{"role": "user", "content": "Hello"}]}
        try:
            await self._ask({"template": template.source, "values": word})
        except TimeoutError:
            _log.warning("a chat template does not end", digest=digest, timeout_s=self._timeout_s)
            self._refused_until[digest] = time.monotonic() + _REFUSED_S
            self._check_not_refused(digest)

    async def _ask_again(self, request: Mapping[str, Any]) -> dict[str, str]:
        """Blame the messages only when they are late twice: the process may have been paused."""
        try:
            return await self._ask(request)
        except TimeoutError:
            raise InvalidInputError(
                f"The chat template takes longer than {self._timeout_s:g} s for these messages. Send fewer.",
                field="messages",
            ) from None

    async def _ask(self, request: Mapping[str, Any]) -> dict[str, str]:
        """Return the process's answer. Raises TimeoutError, which ends the process."""
        process = await self._started()
        assert process.stdin
        assert process.stdout
        try:
            async with asyncio.timeout(self._timeout_s):
                process.stdin.write(json.dumps(request).encode() + b"\n")
                await process.stdin.drain()
                line = await process.stdout.readline()
        except ValueError:
            await self._kill(process)
            raise InvalidInputError(
                f"The prompt of these messages has more than {_MOST_ANSWER_BYTES} bytes. Send fewer.", field="messages"
            ) from None
        except BaseException:  # its answer would be left to the next
            await self._kill(process)
            raise
        if not line:
            await self._kill(process)
            raise InvalidBundleError(
                "The model's chat template ended the process that renders it.", field="template_digest"
            )
        answer: dict[str, str] = json.loads(line)
        return answer

    async def _started(self) -> asyncio.subprocess.Process:
        if self._process is None or self._process.returncode is not None:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "modelfleet.tokenizer.chat_renderer"),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                limit=_MOST_ANSWER_BYTES,
            )
            await self._warm(self._process)
        return self._process

    async def _warm(self, process: asyncio.subprocess.Process) -> None:
        """Let the interpreter start before a template's time runs."""
        assert process.stdin
        assert process.stdout
        process.stdin.write(b'{"template": "", "values": {}}\n')
        try:
            async with asyncio.timeout(_START_S):
                line = await process.stdout.readline()
        except TimeoutError:
            line = b""
        if not line:
            await self._kill(process)
            raise SessionFailureError("The process that renders chat templates does not start. Retry.")

    async def _kill(self, process: asyncio.subprocess.Process) -> None:
        self._process = None
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
