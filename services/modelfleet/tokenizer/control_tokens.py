"""
Control tokens that a caller spells in a text, such as `</s>`, and that are to stay text.

A tokenizer takes the spelling of a special token for the token wherever it stands, so that a user's message could open
a turn of the system. Where that must not be, a text is encoded in pieces, none of which has the whole spelling: it is
cut behind the first character of each. In a prompt that a chat template has written, `MARK` stands where to cut: the
template's own control tokens have none.

Tokens that are added but not special, such as `<think>`, are what models write themselves and templates look for in
contents: these stay tokens.
"""

import re
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import TypeAlias

import tokenizers

MARK = "\ufdd0"
"""Unicode's first code point that is no character, for use within a process."""
_IN_ITS_PLACE = "\ufffd"

Spellings: TypeAlias = "re.Pattern[str] | None"


def spellings(library: tokenizers.Tokenizer) -> Spellings:
    """Return what finds the special tokens of a tokenizer in a text, also those that lie over each other."""
    special = [token for token in library.get_added_tokens_decoder().values() if token.special]
    return spelled((token.content for token in special), any_case=any(token.normalized for token in special))


def spelled(contents: Iterable[str], *, any_case: bool = False) -> Spellings:
    """Return what finds these tokens in a text; one of a single character cannot be cut."""
    by_length = sorted({content for content in contents if len(content) > 1}, key=len, reverse=True)
    if not by_length:
        return None
    return re.compile(f"(?={'|'.join(map(re.escape, by_length))})", re.IGNORECASE if any_case else 0)


def marked(text: str, found: Spellings) -> str:
    """Return a text with a mark in each control token that it spells."""
    text = text.replace(MARK, _IN_ITS_PLACE)
    return MARK.join(pieces(text, found))


def pieces(text: str, found: Spellings) -> Sequence[str]:
    """Return the pieces of a text to encode one by one, so that no control token comes of it."""
    if found is None:
        return [text]
    cuts = [0, *(match.start() + 1 for match in found.finditer(text)), len(text)]
    return [text[start:end] for start, end in pairwise(cuts)]
