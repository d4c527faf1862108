"""Generated text, streamed."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy.typing as npt

from modelfleet.api.inference.v1 import inference_pb2 as pb
from modelfleet.api.tokenizer.v1 import tokenizer_pb2
from modelfleet.client.packing import as_ids, unpack_ints, unpack_vectors
from modelfleet.client.steps import Method, Service
from modelfleet.runtime.errors import InvalidInputError

GENERATE = Method(Service.INFERENCE, "/modelfleet.api.inference.v1.InferenceService/Generate", pb.GenerateResponse)

FinishReason: TypeAlias = Literal["stop", "length", "stop_string", "cancelled"]
Messages: TypeAlias = Sequence[Mapping[str, str]]

_FINISH: Mapping[int, FinishReason] = {
    pb.FINISH_REASON_STOP: "stop",
    pb.FINISH_REASON_LENGTH: "length",
    pb.FINISH_REASON_STOP_STRING: "stop_string",
    pb.FINISH_REASON_CANCELLED: "cancelled",
}


@dataclass(frozen=True, slots=True)
class GenerateUsage:
    """Tokens of the prompt, those of them whose computation was still there, and tokens generated."""

    prompt_tokens: int
    cached_prompt_tokens: int
    generated_tokens: int


@dataclass(frozen=True, slots=True)
class GeneratedChunk:
    """
    The next piece of continuation `index`: whole characters, to be appended to those before.

    `token_ids` are those generated since its chunk before; `logprobs` has one for each when asked for. The last chunk
    of a continuation has a `finish_reason` and its `usage`; `stop` is the stop string that ended it.
    """

    text: str
    index: int
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: FinishReason | None
    stop: str
    usage: GenerateUsage | None
    model: str
    model_version: int


@dataclass(frozen=True, slots=True)
class Stream:
    """A call that is answered by many messages."""

    method: Method[pb.GenerateResponse]
    request: pb.GenerateRequest
    timeout_s: float | None


def generate(
    model: str,
    prompt: str = "",
    *,
    messages: Messages = (),
    template_variables: Mapping[str, Any] | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
    token_ids: npt.ArrayLike | None = None,
    max_tokens: int = 0,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    repetition_penalty: float | None = None,
    stop: Sequence[str] = (),
    n: int = 1,
    json_schema: str | None = None,
    regex: str | None = None,
    logprobs: bool = False,
    timeout_s: float | None = None,
) -> Stream:
    """
    Continue a prompt, or answer `messages` such as {"role": "user", "content": "Hello"}; yields chunks as they come.

    What is None is as the model's settings say; temperature 0 always takes the likeliest token. The text ends before
    any of `stop`. `template_variables`, such as {"enable_thinking": False}, and `tools` are what the model's chat
    template reads besides messages; what it does not read is refused. `json_schema` (a JSON text) or `regex` holds the
    text to a grammar. `n` continuations come side by side. Leaving the iteration early ends the generation.
    `timeout_s` is for the whole stream.
    """
    if json_schema is not None and regex is not None:
        raise InvalidInputError("Both json_schema and regex are given. Give one of them.", field="guidance")
    sampling: dict[str, Any] = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "seed": seed,
        "repetition_penalty": repetition_penalty,
    }
    guidance = {key: text for key, text in (("json_schema", json_schema), ("regex", regex)) if text is not None}
    try:
        request = pb.GenerateRequest(
            model=model,
            prompt=prompt,
            messages=[_message(index, message) for index, message in enumerate(messages)],
            token_ids=b"" if token_ids is None else as_ids(token_ids).tobytes(),
            max_tokens=max_tokens,
            sampling=pb.Sampling(**{key: value for key, value in sampling.items() if value is not None}),
            stop=[stop] if isinstance(stop, str) else stop,
            n=n,
            guidance=pb.Guidance(**guidance) if guidance else None,
            logprobs=logprobs,
            template_variables_json=json.dumps(template_variables) if template_variables else "",
            tools_json="" if tools is None else json.dumps(list(tools)),
        )
    except (ValueError, TypeError) as error:  # out of the range of the contract's integers, or not of its type
        raise InvalidInputError(f"The request cannot be written: {error}.") from error
    return Stream(GENERATE, request, timeout_s)


def chunk(message: pb.GenerateResponse) -> GeneratedChunk:
    """Return a message as a caller sees it."""
    usage = message.usage
    return GeneratedChunk(
        text=message.text,
        index=message.index,
        token_ids=tuple(unpack_ints(message.token_ids).tolist()),
        logprobs=tuple(unpack_vectors(message.logprobs, 1)[:, 0].tolist()),
        finish_reason=_FINISH.get(message.finish_reason),
        stop=message.stop,
        usage=(
            GenerateUsage(usage.prompt_tokens, usage.cached_prompt_tokens, usage.generated_tokens)
            if message.HasField("usage")
            else None
        ),
        model=message.model,
        model_version=message.model_version,
    )


def _message(index: int, message: Mapping[str, str]) -> tokenizer_pb2.ChatMessage:
    if missing := {"role", "content"} - message.keys():
        raise InvalidInputError(
            f"messages[{index}] has no {' and no '.join(sorted(missing))}. Give a role and a content.",
            field="messages",
        )
    return tokenizer_pb2.ChatMessage(role=message["role"], content=message["content"])
