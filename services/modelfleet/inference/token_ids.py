"""Token ids that callers send themselves: whether they can be run."""

from modelfleet.inference.tokens import Tokens
from modelfleet.runtime.errors import InvalidInputError


def check_token_ids(tokens: Tokens, max_tokens: int, vocabulary_size: int | None, type_count: int | None) -> None:
    """
    Raise InvalidInputError unless ids, lengths and type ids fit each other and the model.

    `vocabulary_size` and `type_count` are how many ids and types of them the graph knows, None where nobody knows.
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
    if (longest := int(tokens.lengths.max())) > max_tokens:
        raise InvalidInputError(
            f"A sequence of token_ids has {longest} ids; the model takes at most {max_tokens}. Cut it.",
            field="token_ids.lengths",
        )
    largest, smallest = int(tokens.ids.max()), int(tokens.ids.min())
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
    if type_count is not None and (highest := int(tokens.type_ids.max())) >= type_count:
        raise InvalidInputError(
            f"The type id {highest} is outside the model's, which are 0 to {type_count - 1}.",
            field="token_ids.type_ids",
        )
