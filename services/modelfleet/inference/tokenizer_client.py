"""The tokenizer service as a worker sees it: gRPC on one side, arrays on the other."""

import math
from collections.abc import Sequence
from typing import Any, TypeVar

import grpc
import numpy as np
import structlog
from google.protobuf.message import Message

from modelfleet.api.tokenizer.v1 import tokenizer_pb2, tokenizer_pb2_grpc
from modelfleet.bundle.bundle import Bundle
from modelfleet.client.errors import from_rpc_error
from modelfleet.inference.generation.answering import Prompt
from modelfleet.inference.tokenization import TokenizeOptions
from modelfleet.inference.tokens import Tokens
from modelfleet.runtime.errors import (
    DeadlineExpiredError,
    InvalidBundleError,
    ManagerUnreachableError,
    ModelfleetError,
    TokenizerUnreachableError,
)
from modelfleet.runtime.telemetry import outgoing_metadata

R = TypeVar("R")

_CHECK_TIMEOUT_S = 30.0
# What callers of a worker do not send: it follows from the model that they name.
_FIELDS_OF_THE_MODEL = ("tokenizer_digest", "template_digest", "max_tokens")

_log = structlog.get_logger()


class TokenizerClient:
    """A line to the tokenizer service."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub = tokenizer_pb2_grpc.TokenizerServiceStub(channel)

    async def tokenize(
        self, options: TokenizeOptions, texts: Sequence[str], pairs: Sequence[str], timeout_s: float
    ) -> Tokens:
        """
        Return the windows of all texts.

        Raises TokenizerUnreachableError, ManagerUnreachableError where the service lacks the tokenizer and cannot fetch
        it, or what else the service raised.
        """
        request = tokenizer_pb2.TokenizeRequest(
            tokenizer_digest=options.tokenizer_digest,
            texts=texts,
            pairs=pairs,
            max_tokens=options.max_tokens,
            truncation=tokenizer_pb2.Truncation.Value(f"TRUNCATION_{options.truncation.value}"),
            windowing=None if options.stride is None else tokenizer_pb2.Windowing(stride=options.stride),
            with_offsets=options.with_offsets,
            no_special_tokens=not options.special_tokens,
            rendered=options.rendered,
            control_tokens_as_text=options.control_tokens_as_text,
        )
        return _tokens(await _answered(self._stub.Tokenize, request, timeout_s))

    async def detokenize(self, digest: str, sequences: Sequence[Sequence[int]], timeout_s: float) -> list[str]:
        """Return one text a sequence of ids. Raises as `tokenize` does."""
        request = tokenizer_pb2.DetokenizeRequest(
            tokenizer_digest=digest,
            ids=np.array([id_ for ids in sequences for id_ in ids], "<i4").tobytes(),
            lengths=np.array([len(ids) for ids in sequences], "<i4").tobytes(),
            skip_unknown_ids=True,
        )
        return list((await _answered(self._stub.Detokenize, request, timeout_s)).texts)

    async def render_chat(self, bundle: Bundle, prompt: Prompt, timeout_s: float) -> str:
        """Return the prompt that the bundle's chat template writes. Raises as `tokenize` does."""
        request = tokenizer_pb2.RenderChatRequest(
            template_digest=bundle.chat_template_digest or "",
            tokenizer_digest=bundle.tokenizer_digest or "",
            messages=[tokenizer_pb2.ChatMessage(role=turn.role, content=turn.content) for turn in prompt.turns],
            special_tokens=bundle.manifest.special_tokens,
            template_variables_json=prompt.template_variables_json,
            tools_json=prompt.tools_json,
        )
        return (await _answered(self._stub.RenderChat, request, timeout_s)).text

    async def check(self, digest: str) -> None:
        """
        Have the service load a tokenizer. Raises InvalidBundleError where it cannot use it.

        A service that is away says nothing of the tokenizer, and does not keep a model from callers that send ids.
        """
        request = tokenizer_pb2.GetTokenizerRequest(tokenizer_digest=digest)
        try:
            await _answered(self._stub.GetTokenizer, request, _CHECK_TIMEOUT_S)
        except InvalidBundleError:
            raise
        except ModelfleetError as error:
            _log.warning("tokenizer not checked", digest=digest, error=error.message)


async def _answered(method: "grpc.aio.UnaryUnaryMultiCallable[Any, R]", request: Message, timeout_s: float) -> R:
    timeout = timeout_s if math.isfinite(timeout_s) else None
    try:
        return await method(request, timeout=timeout, metadata=outgoing_metadata())
    except grpc.RpcError as error:
        translated = from_rpc_error(error)
        if translated.field in _FIELDS_OF_THE_MODEL:
            translated.fields = ("model",)
        if isinstance(translated, ManagerUnreachableError):  # the service is there, and lacks what only the manager has
            raise translated from error
        if error.code() is grpc.StatusCode.UNAVAILABLE:
            raise TokenizerUnreachableError(
                f"The tokenizer service cannot be reached ({error.details()}). Retry."
            ) from error
        if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
            message = "The deadline passed while the text was tokenized. Allow more time."
            raise DeadlineExpiredError(message) from error
        raise translated from error


def _tokens(response: tokenizer_pb2.TokenizeResponse) -> Tokens:
    token_counts = np.frombuffer(response.token_counts, "<i4")
    return Tokens(
        ids=np.frombuffer(response.ids, "<i4"),
        lengths=np.frombuffer(response.lengths, "<i4"),
        type_ids=np.frombuffer(response.type_ids, np.uint8) if response.type_ids else None,
        offsets=np.frombuffer(response.offsets, "<i4").reshape(-1, 2) if response.offsets else None,
        window_counts=(
            np.frombuffer(response.window_counts, "<i4") if response.window_counts else np.ones_like(token_counts)
        ),
        token_counts=token_counts,
    )
