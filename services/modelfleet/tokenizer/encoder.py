"""
From texts to token ids: encode whole, then cut or window here.

The library's own truncation is a setting of the shared tokenizer, which threads may not change, and would hide how many
tokens a text had. What is cut is nevertheless what the library would cut with `enable_truncation`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from typing import TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt
from tokenizers import Encoding, Tokenizer

from modelfleet.runtime.errors import InvalidBundleError, InvalidInputError
from modelfleet.tokenizer.control_tokens import MARK, pieces
from modelfleet.tokenizer.cutting import Layout, Truncation, Window, covered, covered_tokens, truncated, window_room
from modelfleet.tokenizer.tokenizers import LoadedTokenizer

Int32s: TypeAlias = npt.NDArray[np.int32]
T = TypeVar("T")

# Neighbours that share all but a few tokens would make an answer thousands of times its text. Windows may hold so many
# times the tokens of their texts, which allows for sharing three quarters; or so many together, if that is more.
_MOST_REPEATED = 4
_ALWAYS_ALLOWED_TOKENS = 1 << 20


@dataclass(frozen=True, slots=True)
class EncodingOptions:
    """
    How texts become tokens.

    `max_tokens` is the most tokens in a window, special tokens included; 0 for no limit.
    `stride`, if given, asks for windows instead of truncation: so many tokens are shared by neighbours.
    `rendered` says that the texts are prompts of chat templates, with marks where contents spell control tokens;
    `control_tokens_as_text` that no text's spelling of one is to become one.
    """

    max_tokens: int = 0
    truncation: Truncation = Truncation.RIGHT
    stride: int | None = None
    special_tokens: bool = True
    offsets: bool = False
    rendered: bool = False
    control_tokens_as_text: bool = False


@dataclass(frozen=True, slots=True)
class Tokens:
    """
    Encoded texts as windows in the order of the texts, the windows of one text one after another.

    `ids` is int32 [tokens]; `lengths` is int32 [windows];
    `type_ids` is uint8 [tokens], or [0] when all are 0;
    `offsets` is int32 [2 * tokens], first character and the one after the last, or [0] when not asked for;
    `window_counts` is int32 [texts], or [0] when every text has one window;
    `token_counts` is int32 [texts], before any cut, special tokens included.
    """

    ids: Int32s
    lengths: Int32s
    type_ids: npt.NDArray[np.uint8]
    offsets: Int32s
    window_counts: Int32s
    token_counts: Int32s


def encode(
    tokenizer: LoadedTokenizer,
    texts: Sequence[str],
    pairs: Sequence[str],
    options: EncodingOptions,
    *,
    first_index: int = 0,
) -> Tokens:
    """
    Encode texts, or pairs when `pairs` has one for each. `first_index` numbers the first text in error messages.

    Raises InvalidInputError where windows or truncation cannot do what is asked for, InvalidBundleError when the
    tokenizer itself fails.
    """
    _check(tokenizer, options, is_pair=bool(pairs))
    encodings = _encode_whole(tokenizer, texts, pairs, options)
    token_counts = np.fromiter(map(len, encodings), np.int32, len(encodings))
    windows: list[list[Window]] | None = None
    lengths, window_counts = token_counts, np.empty(0, np.int32)
    if options.max_tokens and token_counts.max(initial=0) > options.max_tokens:
        windows = _windows(encodings, options, first_index)
        lengths = np.fromiter(map(_length, chain.from_iterable(windows)), np.int32)
        if len(lengths) > len(encodings):
            window_counts = np.fromiter(map(len, windows), np.int32, len(windows))
    type_ids: list[int] = []
    if (bool(pairs), options.special_tokens) in tokenizer.type_ids_of:
        type_ids = _gathered(encodings, windows, lambda encoding: encoding.type_ids)
    offsets: list[tuple[int, int]] = []
    if options.offsets:
        offsets = _gathered(encodings, windows, lambda encoding: encoding.offsets)
    return Tokens(
        ids=np.array(_gathered(encodings, windows, lambda encoding: encoding.ids), np.int32),
        lengths=lengths,
        type_ids=np.array(type_ids if any(type_ids) else [], np.uint8),
        offsets=np.fromiter(chain.from_iterable(offsets), np.int32, 2 * len(offsets)),
        window_counts=window_counts,
        token_counts=token_counts,
    )


def _check(tokenizer: LoadedTokenizer, options: EncodingOptions, *, is_pair: bool) -> None:
    if options.max_tokens < 0:
        raise InvalidInputError(f"max_tokens is {options.max_tokens}. Use 0 for no limit.", field="max_tokens")
    if options.stride is not None and options.stride < 0:
        raise InvalidInputError(f"stride is {options.stride}. Use 0 or more.", field="windowing.stride")
    if options.max_tokens == 0:
        if options.stride is not None:
            raise InvalidInputError("windowing needs max_tokens, the size of a window.", field="max_tokens")
        return
    added = (tokenizer.added_to_pair if is_pair else tokenizer.added_to_single) if options.special_tokens else 0
    room = options.max_tokens - added
    if room < 1:
        raise InvalidInputError(
            f"max_tokens is {options.max_tokens}, but {added} special tokens are added. Use at least {added + 1}.",
            field="max_tokens",
        )
    if options.stride is not None and options.stride >= room:
        raise InvalidInputError(
            f"stride is {options.stride}, but a window of {options.max_tokens} tokens has room for {room} beside the "
            f"special tokens. Use at most {room - 1}.",
            field="windowing.stride",
        )


def _encode_whole(
    tokenizer: LoadedTokenizer, texts: Sequence[str], pairs: Sequence[str], options: EncodingOptions
) -> list[Encoding]:
    library = tokenizer.library
    encode_batch = library.encode_batch if options.offsets else library.encode_batch_fast
    inputs = list(zip(texts, pairs, strict=True)) if pairs else list(texts)
    try:
        encodings = encode_batch(inputs, add_special_tokens=options.special_tokens)
        if options.rendered or options.control_tokens_as_text:
            _encode_pieces(tokenizer, texts, pairs, options, encodings)
    except Exception as error:  # the library raises bare Exception, such as for a vocabulary without its [UNK]
        raise InvalidBundleError(
            f"Tokenizer {tokenizer.digest} failed: {error}. Push the model with a repaired tokenizer.json.",
            field="tokenizer_digest",
        ) from error
    return encodings


def _encode_pieces(
    tokenizer: LoadedTokenizer,
    texts: Sequence[str],
    pairs: Sequence[str],
    options: EncodingOptions,
    encodings: list[Encoding],
) -> None:
    """Encode those texts anew that are to be encoded piece by piece."""
    library = tokenizer.library
    for index, (text, pair) in enumerate(zip_longest(texts, pairs, fillvalue="")):
        halves = [_pieces(tokenizer, half, options) for half in (text, pair)]
        if max(map(len, halves)) > 1:
            first, second = (_merged(library, half) for half in halves)
            encodings[index] = library.post_process(first, second if pairs else None, options.special_tokens)


def _pieces(tokenizer: LoadedTokenizer, text: str, options: EncodingOptions) -> Sequence[str]:
    if options.rendered:
        return text.split(MARK)
    return pieces(text, tokenizer.spellings) if options.control_tokens_as_text else [text]


def _merged(library: Tokenizer, parts: Sequence[str]) -> Encoding:
    return Encoding.merge([library.encode(part, add_special_tokens=False) for part in parts], growing_offsets=True)


def check_repeated(tokens: int, windowed: int, options: EncodingOptions) -> None:
    """Raise InvalidInputError where windows would hold `windowed` tokens, out of proportion to the texts' `tokens`."""
    most = max(_MOST_REPEATED * tokens, _ALWAYS_ALLOWED_TOKENS)
    if windowed > most:
        raise InvalidInputError(
            f"windowing.stride is {options.stride}: the texts have {tokens} tokens, and windows of "
            f"{options.max_tokens} would repeat them to more than {most}. Use a smaller stride, or send less at once.",
            field="windowing.stride",
        )


def _windows(encodings: Sequence[Encoding], options: EncodingOptions, first_index: int) -> list[list[Window]]:
    """Return the windows of each text: itself where it fits."""
    layouts = [_layout(encoding) if len(encoding) > options.max_tokens else None for encoding in encodings]
    if options.stride is not None:
        _check_windows(encodings, layouts, options, first_index)
    found: list[list[Window]] = []
    for index, (encoding, layout) in enumerate(zip(encodings, layouts, strict=True), first_index):
        if layout is None:
            found.append([(slice(0, len(encoding)),)])
        elif options.stride is not None:
            found.append(covered(layout, options.max_tokens, options.stride))
        elif options.truncation is Truncation.FORBIDDEN:
            pair = f"pairs[{index}]" if layout.second else ""
            raise InvalidInputError(
                f"texts[{index}]{pair and f' with {pair}'} has {layout.length} tokens, more than the "
                f"{options.max_tokens} allowed, and truncation is forbidden. Shorten it, or ask for windowing or "
                "another truncation.",
                field=pair or f"texts[{index}]",
            )
        else:
            found.append([truncated(layout, options.max_tokens, options.truncation)])
    return found


def _check_windows(
    encodings: Sequence[Encoding], layouts: Sequence[Layout | None], options: EncodingOptions, first_index: int
) -> None:
    """Raise InvalidInputError where a text leaves no room beside the stride, or where windows repeat too much."""
    assert options.stride is not None
    tokens = windowed = 0
    for index, (encoding, layout) in enumerate(zip(encodings, layouts, strict=True), first_index):
        tokens += len(encoding)
        if layout is None:
            windowed += len(encoding)
            continue
        room = window_room(layout, options.max_tokens)
        if options.stride >= room:
            raise InvalidInputError(
                f"texts[{index}] has {len(layout.first)} tokens and is repeated whole in each window of "
                f"{options.max_tokens}, which leaves {max(room, 0)} for its pair: not more than the stride of "
                f"{options.stride}. Shorten the text or the stride, or allow more max_tokens.",
                field=f"texts[{index}]",
            )
        windowed += covered_tokens(layout, options.max_tokens, options.stride)
    check_repeated(tokens, windowed, options)


def _layout(encoding: Encoding) -> Layout:
    sequence_ids = encoding.sequence_ids
    return Layout(len(encoding), _half(sequence_ids, 0), _half(sequence_ids, 1))


def _half(sequence_ids: list[int | None], half: int) -> range:
    count = sequence_ids.count(half)
    start = sequence_ids.index(half) if count else len(sequence_ids)
    return range(start, start + count)


def _length(window: Window) -> int:
    return sum(part.stop - part.start for part in window)


def _gathered(
    encodings: Sequence[Encoding], windows: Sequence[Sequence[Window]] | None, values_of: Callable[[Encoding], list[T]]
) -> list[T]:
    """Return the values of all tokens that are kept. Lists are joined in C, which costs about 1 us a text."""
    gathered: list[T] = []
    if windows is None:
        for encoding in encodings:
            gathered += values_of(encoding)
        return gathered
    for encoding, windows_of_text in zip(encodings, windows, strict=True):
        values = values_of(encoding)
        for window in windows_of_text:
            for part in window:
                gathered += values[part]
    return gathered
