"""
A process that renders chat templates and nothing else: `python -m modelfleet.tokenizer.chat_renderer`.

Templates come with models, so they are programs of strangers. Jinja's sandbox keeps them from Python's objects but not
from running for ever or filling the memory; an operating system can do both to a process. Reads one JSON object a line,
writes one JSON object a line. Its parent, `chats.py`, kills it when an answer is late.
"""

import json
import resource
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, meta
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

_MEMORY_BYTES = 512 << 20
_KEPT_TEMPLATES = 64


class RefusedByTemplateError(Exception):
    """The template itself says that it cannot write these messages."""


@lru_cache(_KEPT_TEMPLATES)
def _compiled(template: str) -> Template:
    # As the transformers library sets it up, which the templates are written for:
    # https://github.com/huggingface/transformers/blob/main/src/transformers/utils/chat_template_utils.py
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.now(UTC).strftime(form)
    environment.globals.pop("lipsum")  # makes text without end
    return environment.from_string(template)


@lru_cache(_KEPT_TEMPLATES)
def _names(template: str) -> frozenset[str]:
    """Return the names that a template looks up in what it is given."""
    return frozenset(meta.find_undeclared_variables(_compiled(template).environment.parse(template)))


class _Generation(Extension):
    """`{% generation %}`, which marks the assistant's words for training, marks nothing here."""

    tags = {"generation"}  # noqa: RUF012  as Jinja declares it

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _tojson(value: object, indent: int | None = None, **_: object) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)  # Jinja's own escapes for HTML


def _refuse(message: str) -> NoReturn:
    raise RefusedByTemplateError(message)


def render(template: str, values: Mapping[str, object], read: Sequence[str] = ()) -> dict[str, str]:
    """
    Return `text`; or else `refused`, where the messages are at fault, or `broken`, where the template is.

    `unread` is the first name in `read` that the template does not read.
    """
    try:
        if unread := sorted(set(read) - _names(template)):
            return {"unread": unread[0]}
        return {"text": _compiled(template).render(**values)}
    except RefusedByTemplateError as error:
        return {"refused": str(error)}
    except (TemplateError, ArithmeticError, LookupError, TypeError, ValueError, RecursionError, MemoryError) as error:
        return {"broken": f"{type(error).__name__}: {error}"}


def main() -> None:
    """Answer until standard input ends."""
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    for line in sys.stdin.buffer:
        request = json.loads(line)
        answer = json.dumps(render(request["template"], request["values"], request.get("read", ())))
        sys.stdout.write(answer + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
