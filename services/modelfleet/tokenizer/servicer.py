"""TokenizerService: protobuf in, protobuf out."""

from collections.abc import Awaitable, Callable, Mapping

import numpy as np

from modelfleet.api.tokenizer.v1 import tokenizer_pb2, tokenizer_pb2_grpc
from modelfleet.bundle.reference import ModelReference
from modelfleet.runtime.errors import InvalidInputError
from modelfleet.runtime.interceptors import Context
from modelfleet.tokenizer import metrics
from modelfleet.tokenizer.chats import Chats, Message, parse_values
from modelfleet.tokenizer.control_tokens import spelled
from modelfleet.tokenizer.cutting import Truncation
from modelfleet.tokenizer.encoder import EncodingOptions, Int32s
from modelfleet.tokenizer.encoding_threads import EncodingThreads
from modelfleet.tokenizer.limits import Limits
from modelfleet.tokenizer.tokenizers import LoadedTokenizer, TokenizerStore

_TRUNCATIONS = {
    tokenizer_pb2.TRUNCATION_UNSPECIFIED: Truncation.RIGHT,
    tokenizer_pb2.TRUNCATION_RIGHT: Truncation.RIGHT,
    tokenizer_pb2.TRUNCATION_LEFT: Truncation.LEFT,
    tokenizer_pb2.TRUNCATION_FORBIDDEN: Truncation.FORBIDDEN,
}
_INT32 = np.dtype("<i4")
# Of the time that a caller gives: what is left for the answer to arrive, when a tokenizer is still not there.
_WAIT_SHARE = 0.9


class TokenizerServicer(tokenizer_pb2_grpc.TokenizerServiceServicer):
    """
    Translates.

    `tokenizer_digest` returns the digest of a model's tokenizer, `chat_template` that of its template with what the
    template calls by name.
    """

    def __init__(
        self,
        store: TokenizerStore,
        threads: EncodingThreads,
        limits: Limits,
        chats: Chats,
        *,
        tokenizer_digest: Callable[[ModelReference], Awaitable[str]],
        chat_template: Callable[[ModelReference], Awaitable[tuple[str, Mapping[str, str]]]],
    ) -> None:
        self._store = store
        self._threads = threads
        self._limits = limits
        self._chats = chats
        self._tokenizer_digest = tokenizer_digest
        self._chat_template = chat_template

    async def Tokenize(
        self, request: tokenizer_pb2.TokenizeRequest, context: Context
    ) -> tokenizer_pb2.TokenizeResponse:
        """Encode texts."""
        texts, pairs = list(request.texts), list(request.pairs)
        self._limits.check_texts(texts, pairs)
        options = _options(request)
        tokenizer = await self._loaded(request.tokenizer_digest, context)
        with metrics.ENCODE_SECONDS.time():
            tokens = await self._threads.encode(tokenizer, texts, pairs, options)
        metrics.TEXTS.observe(len(texts))
        metrics.TOKENS.observe(len(tokens.ids))
        return tokenizer_pb2.TokenizeResponse(
            ids=_packed(tokens.ids),
            lengths=_packed(tokens.lengths),
            type_ids=tokens.type_ids.tobytes(),
            offsets=_packed(tokens.offsets),
            window_counts=_packed(tokens.window_counts),
            token_counts=_packed(tokens.token_counts),
        )

    async def Detokenize(
        self, request: tokenizer_pb2.DetokenizeRequest, context: Context
    ) -> tokenizer_pb2.DetokenizeResponse:
        """Decode token ids."""
        ids, lengths = _unpacked(request.ids, field="ids"), _unpacked(request.lengths, field="lengths")
        self._limits.check_count(len(lengths), field="lengths")
        tokenizer = await self._loaded(request.tokenizer_digest, context)
        texts = await self._threads.decode(
            *(tokenizer, ids, lengths),
            keep_special_tokens=request.keep_special_tokens,
            skip_unknown_ids=request.skip_unknown_ids,
        )
        return tokenizer_pb2.DetokenizeResponse(texts=texts)

    async def RenderChat(
        self, request: tokenizer_pb2.RenderChatRequest, context: Context
    ) -> tokenizer_pb2.RenderChatResponse:
        """Write messages as a prompt."""
        self._limits.check_count(len(request.messages), field="messages")
        tokens: Mapping[str, str] = dict(request.special_tokens)
        more = parse_values(request.template_variables_json, request.tools_json)
        tokenizer_digest = request.tokenizer_digest
        match request.WhichOneof("template"):
            case "template_digest":
                digest = request.template_digest
            case "model":
                reference = ModelReference.parse(request.model)
                digest, tokens = await self._chat_template(reference)
                tokenizer_digest = tokenizer_digest or await self._tokenizer_digest(reference)
            case _:
                raise InvalidInputError(
                    "Nothing names the template. Give template_digest or model.", field="template_digest"
                )
        messages = [Message(message.role, message.content) for message in request.messages]
        if tokenizer_digest:
            found = (await self._loaded(tokenizer_digest, context)).spellings
        else:  # a worker of an earlier release
            found = spelled(tokens.values())
        text = await self._chats.render(
            digest,
            messages,
            tokens,
            open_answer=not request.no_generation_prompt,
            more=more,
            found=found,
        )
        return tokenizer_pb2.RenderChatResponse(text=text)

    async def GetTokenizer(
        self, request: tokenizer_pb2.GetTokenizerRequest, context: Context
    ) -> tokenizer_pb2.GetTokenizerResponse:
        """Describe a tokenizer."""
        match request.WhichOneof("tokenizer"):
            case "tokenizer_digest":
                digest = request.tokenizer_digest
            case "model":
                digest = await self._tokenizer_digest(ModelReference.parse(request.model))
            case _:
                raise InvalidInputError(
                    "Nothing names the tokenizer. Give tokenizer_digest or model.", field="tokenizer_digest"
                )
        tokenizer = await self._loaded(digest, context)
        return tokenizer_pb2.GetTokenizerResponse(
            tokenizer=tokenizer_pb2.Tokenizer(
                digest=tokenizer.digest,
                vocabulary_size=tokenizer.vocabulary_size,
                special_tokens=[
                    tokenizer_pb2.SpecialToken(content=token.content, id=token.id) for token in tokenizer.special_tokens
                ],
                added_to_single=tokenizer.added_to_single,
                added_to_pair=tokenizer.added_to_pair,
            )
        )

    async def _loaded(self, digest: str, context: Context) -> LoadedTokenizer:
        remaining = context.time_remaining()
        return await self._store.get(digest, wait_s=None if remaining is None else remaining * _WAIT_SHARE)


def _options(request: tokenizer_pb2.TokenizeRequest) -> EncodingOptions:
    if request.truncation not in _TRUNCATIONS:
        raise InvalidInputError(
            f"truncation is {request.truncation}, which this server does not know. Use a value of Truncation.",
            field="truncation",
        )
    return EncodingOptions(
        max_tokens=request.max_tokens,
        truncation=_TRUNCATIONS[request.truncation],
        stride=request.windowing.stride if request.HasField("windowing") else None,
        special_tokens=not request.no_special_tokens,
        offsets=request.with_offsets,
        rendered=request.rendered,
        control_tokens_as_text=request.control_tokens_as_text,
    )


def _packed(values: Int32s) -> bytes:
    return values.astype(_INT32, copy=False).tobytes()


def _unpacked(packed: bytes, *, field: str) -> Int32s:
    if len(packed) % _INT32.itemsize:
        raise InvalidInputError(
            f"{field} has {len(packed)} bytes, not a multiple of 4. Pack little-endian int32.",
            field=field,
        )
    return np.frombuffer(packed, _INT32)
