import asyncio
import hashlib
import json
import os
import signal
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from modelfleet.runtime.errors import InvalidBundleError, InvalidInputError
from modelfleet.tokenizer.chats import ROLES, Chats, Message, parse_template

CHATML = """{% for message in messages %}<|im_start|>{{ message['role'] }}
{{ message.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
HELLO = (Message("user", "Hello"),)


@dataclass
class Templates:
    """Templates by digest."""

    contents: dict[str, bytes] = field(default_factory=dict)

    def add(self, template: str) -> str:
        digest = hashlib.sha256(template.encode()).hexdigest()
        self.contents[digest] = template.encode()
        return digest

    async def fetch(self, digest: str) -> bytes:
        return self.contents[digest]


@pytest.fixture
def templates() -> Templates:
    return Templates()


@pytest.fixture
async def chats(templates: Templates) -> AsyncIterator[Chats]:
    chats = Chats(templates.fetch, timeout_s=0.3)
    yield chats
    await chats.close()


async def assert_still_renders(chats: Chats, templates: Templates) -> None:
    assert await chats.render(templates.add("{{ messages[0].content }}"), HELLO, {}, open_answer=True) == "Hello"


async def test_messages_become_the_prompt_that_the_template_writes(chats: Chats, templates: Templates) -> None:
    messages = [Message("system", "Be kind. {{ 7 * 7 }}"), Message("user", "你好 😀 <b>")]

    prompt = await chats.render(templates.add(CHATML), messages, {}, open_answer=True)

    assert prompt == (
        "<|im_start|>system\nBe kind. {{ 7 * 7 }}<|im_end|>\n<|im_start|>user\n你好 😀 <b><|im_end|>\n"
        "<|im_start|>assistant\n"
    )


async def test_special_tokens_are_called_by_name_and_the_callers_win_over_the_files(
    chats: Chats, templates: Templates
) -> None:
    config = json.dumps({"chat_template": "{{ bos_token }}{{ eos_token }}", "bos_token": "<a>", "eos_token": "<b>"})

    prompt = await chats.render(templates.add(config), HELLO, {"eos_token": "<c>"}, open_answer=False)

    assert prompt == "<a><c>"


@pytest.mark.parametrize(
    "template",
    [
        ENDLESS,
        "{{ 10 ** (10 ** 10) }}",
        "{% macro again() %}{{ again() }}{{ again() }}{% endmacro %}{{ again() }}",
        "{{ 'a' * 10 ** 11 }}",
        "{% for i in range(10 ** 12) %}{% endfor %}",
    ],
)
async def test_a_template_without_bounds_is_stopped(chats: Chats, templates: Templates, template: str) -> None:
    digest = templates.add(template)

    with pytest.raises(InvalidBundleError, match=r"did not end within|fails"):
        await chats.render(digest, HELLO, {}, open_answer=True)

    await assert_still_renders(chats, templates)


async def test_an_endless_template_costs_its_time_once(chats: Chats, templates: Templates) -> None:
    digest = templates.add(ENDLESS)
    with pytest.raises(InvalidBundleError):
        await chats.render(digest, HELLO, {}, open_answer=True)
    await chats.close()  # no process runs, and none is started for a template that is known to be endless

    with pytest.raises(InvalidBundleError, match="may loop for ever"):
        await chats.render(digest, HELLO, {}, open_answer=True)


async def test_messages_that_take_too_long_are_refused_and_not_the_template(chats: Chats, templates: Templates) -> None:
    digest = templates.add("{% for c in messages[0].content %}{% for d in range(9999) %}{% endfor %}{% endfor %}ok")

    with pytest.raises(InvalidInputError, match=r"takes longer than 0.3 s for these messages. Send fewer"):
        await chats.render(digest, [Message("user", "a" * 100_000)], {}, open_answer=True)

    assert await chats.render(digest, HELLO, {}, open_answer=True) == "ok"


async def test_messages_that_are_too_large_are_refused(templates: Templates) -> None:
    chats = Chats(templates.fetch, max_bytes=10)

    with pytest.raises(InvalidInputError, match="The messages have 12 bytes; together they may have 10"):
        await chats.render(templates.add(CHATML), [*HELLO, Message("assistant", "你好!")], {}, open_answer=True)


async def test_a_caller_that_leaves_takes_no_answer_of_another(chats: Chats, templates: Templates) -> None:
    digest = templates.add("{% for i in range(99999) %}{% endfor %}{{ messages[0].content }}")
    renders = [
        asyncio.create_task(chats.render(digest, [Message("user", str(number))], {}, open_answer=True))
        for number in range(6)
    ]
    await asyncio.sleep(0)
    process = None
    while process is None:  # until the first of them is being rendered
        await asyncio.sleep(0.001)
        process = chats._process  # noqa: SLF001  whether it lives on
    for leaving in renders[::2]:
        leaving.cancel()

    assert await asyncio.gather(*renders[1::2]) == ["1", "3", "5"]
    assert chats._process is process  # noqa: SLF001


@pytest.mark.slow
async def test_a_process_that_was_stopped_is_no_fault_of_the_template(chats: Chats, templates: Templates) -> None:
    digest = templates.add("{{ messages[0].content }}")
    await chats.render(digest, HELLO, {}, open_answer=True)
    for pid in renderers():
        os.kill(pid, signal.SIGSTOP)

    assert await chats.render(digest, HELLO, {}, open_answer=True) == "Hello"


def renderers() -> list[int]:
    """Return the processes that this one has started to render templates."""
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return [int(pid) for pid in children if b"chat_renderer" in Path(f"/proc/{pid}/cmdline").read_bytes()]


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__.os.popen('true') }}",
        "{{ missing.attribute }}",
        "{% for %}",
        "{{ lipsum() }}",
    ],
)
async def test_a_template_that_fails_or_reaches_out_is_refused(
    chats: Chats, templates: Templates, template: str
) -> None:
    with pytest.raises(InvalidBundleError, match="chat template"):
        await chats.render(templates.add(template), HELLO, {}, open_answer=True)

    await assert_still_renders(chats, templates)


async def test_what_a_template_refuses_is_the_callers_to_correct(chats: Chats, templates: Templates) -> None:
    digest = templates.add("{{ raise_exception('Conversations start with a user') }}")

    with pytest.raises(InvalidInputError, match="Conversations start with a user"):
        await chats.render(digest, HELLO, {}, open_answer=True)

    await assert_still_renders(chats, templates)


async def test_an_unknown_role_is_refused_with_those_there_are(chats: Chats, templates: Templates) -> None:
    with pytest.raises(InvalidInputError, match=r"messages\[1\]\.role is 'wizard'. Use one of " + ", ".join(ROLES)):
        await chats.render(templates.add(CHATML), [*HELLO, Message("wizard", "!")], {}, open_answer=True)


async def test_of_a_long_role_only_the_beginning_is_repeated(chats: Chats, templates: Templates) -> None:
    with pytest.raises(InvalidInputError, match=r"role is 'A secret .*\.\.\.'\. Use one of") as raised:
        await chats.render(templates.add(CHATML), [Message("A secret text. " * 1000, "!")], {}, open_answer=True)
    assert raised.value.message.count("secret") <= 6


async def test_no_messages_are_refused(chats: Chats, templates: Templates) -> None:
    with pytest.raises(InvalidInputError, match="messages is empty"):
        await chats.render(templates.add(CHATML), [], {}, open_answer=True)


@pytest.mark.parametrize("content", [b"\xff", b'{"bos_token": "<s>"}', b"[1]", b"x" * (2 << 20)])
def test_a_file_without_a_template_is_refused(content: bytes) -> None:
    with pytest.raises(InvalidBundleError):
        parse_template("d" * 64, content)


def test_of_several_named_templates_the_default_is_taken() -> None:
    entries = [{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}]

    assert parse_template("d" * 64, json.dumps({"chat_template": entries}).encode()).source == "d"
