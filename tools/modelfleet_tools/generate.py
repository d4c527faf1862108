"""`modelfleet generate | chat`."""

import sys
from collections.abc import Generator
from contextlib import closing
from pathlib import Path
from typing import Annotated, TypeAlias

import typer
from modelfleet.client.generation_calls import GeneratedChunk

from modelfleet_tools.options import InferenceOption, JsonOption, open_client
from modelfleet_tools.output import print_json, tell

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
    inference: InferenceOption = None,
    timeout: TimeoutOption = _TIMEOUT_S,
    as_json: JsonOption = False,
) -> None:
    """
    Continue a prompt, printing the text as it comes.

    Example: modelfleet generate smollm2 --chat "What is the capital of France?" --max-tokens 64
    """
    text = sys.stdin.read() if prompt in (None, "-") else prompt
    if not text:
        raise typer.BadParameter("Give a prompt, or text on standard input.")
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
        )
        if as_json:
            print_json(_whole(chunks))
        else:
            _printed(chunks)


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
            messages.append({"role": "assistant", "content": _printed(chunks)})


def _line() -> str:
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return ""


def _printed(chunks: Generator[GeneratedChunk, None, None]) -> str:
    """Print what comes and return all of it; Ctrl-C ends it."""
    said = ""
    try:
        with closing(chunks):
            for chunk in chunks:
                said += chunk.text
                print(chunk.text, end="", flush=True)
    except KeyboardInterrupt:
        tell("(ended)")
    print()
    return said


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
