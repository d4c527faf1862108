"""Calls of the tokenizer service."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from modelfleet.api.tokenizer.v1 import tokenizer_pb2 as pb
from modelfleet.client.answers import Tokens
from modelfleet.client.inference_calls import Truncation, truncation_value, windowing_message
from modelfleet.client.packing import Ids, pack_sequences, unpack_ints, unpack_sequences
from modelfleet.client.splitting import text_list, text_sizes
from modelfleet.client.steps import Deadline, Method, Procedure, Service, ask
from modelfleet.runtime.errors import InvalidInputError

_PATH = "/modelfleet.api.tokenizer.v1.TokenizerService"
TOKENIZE = Method(Service.TOKENIZER, f"{_PATH}/Tokenize", pb.TokenizeResponse)
DETOKENIZE = Method(Service.TOKENIZER, f"{_PATH}/Detokenize", pb.DetokenizeResponse)
GET_TOKENIZER = Method(Service.TOKENIZER, f"{_PATH}/GetTokenizer", pb.GetTokenizerResponse)


def tokenize(
    model: str,
    texts: Sequence[str],
    pairs: Sequence[str] = (),
    *,
    max_tokens: int = 0,
    truncation: Truncation = "right",
    window_stride: int | None = None,
    special_tokens: bool = True,
    with_offsets: bool = False,
    timeout_s: float | None = None,
) -> Procedure[Tokens]:
    """
    Encode texts, or pairs of texts, with a model's tokenizer.

    `max_tokens` 0 sets no limit; longer texts are cut as `truncation` says, or covered by windows that share
    `window_stride` tokens.
    """
    deadline = Deadline(timeout_s)
    texts, pairs = text_list(texts, "texts"), text_list(pairs, "pairs")
    text_sizes(texts, "texts")
    text_sizes(pairs, "pairs")
    request = pb.TokenizeRequest(
        tokenizer_digest=(yield from _digest(model, deadline.left())),
        texts=texts,
        pairs=pairs,
        max_tokens=max_tokens,
        truncation=truncation_value(truncation),
        windowing=windowing_message(window_stride),
        no_special_tokens=not special_tokens,
        with_offsets=with_offsets,
    )
    response = yield from ask(TOKENIZE, request, deadline.left())
    lengths = unpack_ints(response.lengths)
    counts = unpack_ints(response.window_counts)
    return Tokens(
        ids=unpack_sequences(response.ids, lengths),
        type_ids=_type_ids(response.type_ids, lengths),
        offsets=unpack_sequences(response.offsets, lengths, width=2) if with_offsets else (),
        window_counts=counts if len(counts) else np.ones(len(texts), np.int32),
        token_counts=unpack_ints(response.token_counts),
    )


def detokenize(
    model: str,
    sequences: Sequence[npt.ArrayLike],
    *,
    keep_special_tokens: bool = False,
    timeout_s: float | None = None,
) -> Procedure[list[str]]:
    """Decode sequences of token ids with a model's tokenizer."""
    deadline = Deadline(timeout_s)
    try:
        ids, lengths = pack_sequences(sequences)
    except ValueError as error:
        raise InvalidInputError(f"sequences: {error}.", field="ids") from error
    request = pb.DetokenizeRequest(
        tokenizer_digest=(yield from _digest(model, deadline.left())),
        ids=ids,
        lengths=lengths,
        keep_special_tokens=keep_special_tokens,
    )
    return list((yield from ask(DETOKENIZE, request, deadline.left())).texts)


def _digest(model: str, timeout_s: float | None) -> Procedure[str]:
    response = yield from ask(GET_TOKENIZER, pb.GetTokenizerRequest(model=model), timeout_s)
    return response.tokenizer.digest


def _type_ids(packed: bytes, lengths: Ids) -> tuple[Ids, ...]:
    flat = np.frombuffer(packed, np.uint8).astype(np.int32) if packed else np.zeros(lengths.sum(), np.int32)
    return tuple(np.split(flat, np.cumsum(lengths)[:-1]))
