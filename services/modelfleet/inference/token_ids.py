"""Token ids that callers send themselves: whether they can be run."""

from collections.abc import Mapping
from types import MappingProxyType

from modelfleet.bundle.manifest import Manifest
from modelfleet.inference.tokens import Tokens
from modelfleet.runtime.errors import InvalidInputError


def check_token_ids(tokens: Tokens, manifest: Manifest, table_rows: Mapping[str, int] = MappingProxyType({})) -> None:
    """
    Raise InvalidInputError unless ids, lengths and type ids fit each other and the model.

    `table_rows` is how many ids and types the graph knows, by its inputs' names, as far as that is known.
    """
    if not len(tokens.lengths):
        raise InvalidInputError("token_ids is empty. Give at least one sequence.", field="token_ids.lengths")
    if (shortest := int(tokens.lengths.min())) < 1:
        raise InvalidInputError(
            f"A sequence of token_ids has the length {shortest}. Give at least one id.", field="token_ids.lengths"
        )
    if int(tokens.lengths.sum()) != len(tokens.ids):
        raise InvalidInputError(
            f"token_ids has {len(tokens.ids)} ids, and lengths that sum to {int(tokens.lengths.sum())}.",
            field="token_ids.lengths",
        )
    if (longest := int(tokens.lengths.max())) > (manifest.max_tokens or longest):
        raise InvalidInputError(
            f"A sequence of token_ids has {longest} ids; the model takes at most {manifest.max_tokens}. Cut it.",
            field="token_ids.lengths",
        )
    largest, smallest = int(tokens.ids.max()), int(tokens.ids.min())
    known = [size for size in (manifest.vocabulary_size, table_rows.get("input_ids")) if size is not None]
    vocabulary_size = min(known, default=None)
    if smallest < 0 or (vocabulary_size is not None and largest >= vocabulary_size):
        outside = smallest if smallest < 0 else largest
        raise InvalidInputError(
            f"The token id {outside} is outside the model's vocabulary, which has "
            f"{vocabulary_size or 'no negative'} ids. Use the tokenizer of this model.",
            field="token_ids.ids",
        )
    if tokens.type_ids is None:
        return
    if len(tokens.type_ids) != len(tokens.ids):
        raise InvalidInputError(
            f"token_ids has {len(tokens.ids)} ids and {len(tokens.type_ids)} type_ids. Give one for each, or none.",
            field="token_ids.type_ids",
        )
    types, highest = table_rows.get("token_type_ids"), int(tokens.type_ids.max())
    if types is not None and highest >= types:
        raise InvalidInputError(
            f"The type id {highest} is outside the model's, which are 0 to {types - 1}.", field="token_ids.type_ids"
        )
