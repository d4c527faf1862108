"""`modelfleet generate | chat`."""

import contextlib
import json
import sys
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypeAlias
from unicodedata import category

import typer
from modelfleet.client.generation_calls import GeneratedChunk
from modelfleet.runtime.errors import ModelfleetError

from modelfleet_tools.options import InferenceOption, JsonOption, open_client
from modelfleet_tools.output import print_json, tell, tell_error

# Long texts take their time.
_TIMEOUT_S = 300.0

ModelArgument: TypeAlias = Annotated[str, typer.Argument(metavar="MODEL", help="NAME, NAME@ALIAS or NAME@NUMBER.")]
MaxTokensOption: TypeAlias = Annotated[
    int, typer.Option("--max-tokens", min=0, help="Most tokens to generate; 0 for the worker's default.")
]
TemperatureOption: TypeAlias = Annotated[
    float | None, typer.Option("--temperature", help="0 takes the likeliest token; higher is more varied.")
]
TopKOption: TypeAlias = Annotated[
    int | None, typer.Option("--top-k", help="Choose among so many likeliest tokens; 0 for all.")
]
TopPOption: TypeAlias = Annotated[
    float | None, typer.Option("--top-p", help="Choose among the likeliest tokens of this probability together.")
]
SeedOption: TypeAlias = Annotated[int | None, typer.Option("--seed", help="Makes sampling repeatable.")]
PenaltyOption: TypeAlias = Annotated[
    float | None, typer.Option("--repetition-penalty", help="Above 1 makes repetitions rarer.")
]
StopOption: TypeAlias = Annotated[
    list[str] | None, typer.Option("--stop", help="End before this text; may be given several times.")
]
SystemOption: TypeAlias = Annotated[
    str | None, typer.Option("--system", help="What the model is told before the conversation.")
]
TimeoutOption: TypeAlias = Annotated[
    float, typer.Option("--timeout", metavar="SECONDS", min=0.001, help="Longest time for an answer.")
]


def generate(
    model: ModelArgument,
    prompt: Annotated[str | None, typer.Argument(help="What to continue; - or nothing for standard input.")] = None,
    *,
    chat: Annotated[bool, typer.Option("--chat", help="Answer the prompt, as a message in a chat.")] = False,
    system: SystemOption = None,
    max_tokens: MaxTokensOption = 0,
    temperature: TemperatureOption = None,
    top_k: TopKOption = None,
    top_p: TopPOption = None,
    seed: SeedOption = None,
    repetition_penalty: PenaltyOption = None,
    stop: StopOption = None,
    json_schema: Annotated[
        Path | None, typer.Option("--json-schema", exists=True, dir_okay=False, help="File of a schema to hold to.")
    ] = None,
    regex: Annotated[str | None, typer.Option("--regex", help="What the whole text matches.")] = None,
    var: Annotated[
        list[str] | None,
        typer.Option("--var", metavar="NAME=JSON", help="What the chat template reads, such as enable_thinking=false."),
    ] = None,
    tools: Annotated[
        Path | None,
        typer.Option("--tools", exists=True, dir_okay=False, help="File of a JSON array of descriptions of tools."),
    ] = None,
    inference: InferenceOption = None,
    timeout: TimeoutOption = _TIMEOUT_S,
    as_json: JsonOption = False,
) -> None:
    """
    Continue a prompt, printing the text as it comes; Ctrl-C ends it.

    Example: modelfleet generate smollm2 --chat "What is the capital of France?" --max-tokens 64
    """
    text = _given(prompt)
    messages = [{"role": "user", "content": text}] if chat or system else []
    if system:
        messages.insert(0, {"role": "system", "content": system})
    with open_client(inference=inference, timeout_s=timeout) as client:
        chunks = client.generate(
            model,
            "" if messages else text,
            messages=messages,
            max_tokens=max_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            repetition_penalty=repetition_penalty,
            stop=stop or (),
            json_schema=json_schema.read_text() if json_schema else None,
            regex=regex,
            template_variables=dict(map(_variable, var or ())),
            tools=_tools(tools) if tools else None,
        )
        if as_json:
            print_json(_whole(chunks))
        else:
            _Answer().print(chunks)


def _variable(assignment: str) -> tuple[str, object]:
    name, sign, text = assignment.partition("=")
    try:
        if name and sign:
            return name, json.loads(text)
    except ValueError:
        pass
    raise typer.BadParameter(f"--var is {assignment!r}. Write NAME=JSON, such as enable_thinking=false.")


def _tools(path: Path) -> list[dict[str, object]]:
    try:
        tools = json.loads(path.read_bytes())
    except ValueError as error:
        raise typer.BadParameter(f"{path} is not JSON: {error}.") from error
    if not isinstance(tools, list):
        raise typer.BadParameter(f"{path} is not a JSON array. Put the tools into one.")
    return tools


def chat(
    model: ModelArgument,
    *,
    system: SystemOption = None,
    max_tokens: MaxTokensOption = 0,
    temperature: TemperatureOption = None,
    top_k: TopKOption = None,
    top_p: TopPOption = None,
    seed: SeedOption = None,
    repetition_penalty: PenaltyOption = None,
    inference: InferenceOption = None,
    timeout: TimeoutOption = _TIMEOUT_S,
) -> None:
    """
    Talk with a model, a line at a time; an empty line or Ctrl-D ends it, Ctrl-C ends an answer.

    Example: modelfleet chat smollm2 --temperature 0.7
    """
    messages = [{"role": "system", "content": system}] if system else []
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401, PLC0415  lets `input` edit lines and recall them
    with open_client(inference=inference, timeout_s=timeout) as client:
        while line := _line():
            messages.append({"role": "user", "content": line})
            chunks = client.generate(
                model,
                messages=messages,
                max_tokens=max_tokens,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                seed=seed,
                repetition_penalty=repetition_penalty,
            )
            answer = _Answer()
            try:
                answer.print(chunks)
            except KeyboardInterrupt:
                tell("(ended)")
            except ModelfleetError as error:
                if not sys.stdin.isatty():
                    raise
                tell_error(error.message)  # whoever sits there can say it otherwise
            if answer.text:
                messages.append({"role": "assistant", "content": answer.text})
            else:
                messages.pop()


def _given(prompt: str | None) -> str:
    if prompt is None and sys.stdin.isatty():
        raise typer.BadParameter("Give a prompt, or text on standard input.")
    try:
        text = sys.stdin.buffer.read().decode().removesuffix("\n") if prompt in (None, "-") else prompt
    except UnicodeDecodeError as error:
        raise typer.BadParameter(f"standard input is not UTF-8 at byte {error.start}. Convert it.") from error
    if not text:
        raise typer.BadParameter("The prompt is empty. Give at least one character.")
    return text


def _line() -> str:
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return ""


@dataclass(slots=True)
class _Answer:
    """What has been printed so far, also where Ctrl-C or an error ended it."""

    text: str = ""

    def print(self, chunks: Generator[GeneratedChunk, None, None]) -> None:
        """Print text as it comes."""
        last = None
        try:
            with closing(chunks):
                for last in chunks:
                    self.text += last.text
                    print(_safe(last.text), end="", flush=True)
        finally:
            if self.text or last:
                print()
        if last and last.finish_reason == "length" and last.usage:
            tell(f"(cut after {last.usage.generated_tokens} tokens; --max-tokens may allow more)")


def _safe(text: str) -> str:
    """Return a text without what would control a terminal; a file gets what was generated."""
    if not sys.stdout.isatty():
        return text
    return "".join("\ufffd" if category(one) == "Cc" and one not in "\n\t" else one for one in text)


def _whole(chunks: Generator[GeneratedChunk, None, None]) -> dict[str, object]:
    received = list(chunks)
    last = received[-1]
    return {
        "text": "".join(chunk.text for chunk in received),
        "finish_reason": last.finish_reason,
        "stop": last.stop,
        "usage": last.usage,
        "model": last.model,
        "model_version": last.model_version,
    }
