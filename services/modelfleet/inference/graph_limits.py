"""
How long a text, and which token ids, a text model's graph takes: tried, where its files may claim more than it has.

Positions may begin behind the padding's id, as in RoBERTa's kin, so that the last ones that a config counts are not
there; a tokenizer may have tokens that the table of vectors has not.
"""

from collections.abc import Awaitable, Callable, Sequence

import numpy as np
import structlog

from modelfleet.inference.made_inputs import random_tokens
from modelfleet.inference.models import TextModel
from modelfleet.inference.self_test_runs import SelfTestRuns, cause
from modelfleet.inference.tokens import Tokens
from modelfleet.runtime.errors import InvalidBundleError, ModelfleetError, NotFiniteError

_log = structlog.get_logger()

_SHORT = 4
# Of which any vocabulary has vectors.
_FIRST_IDS = 16


async def fit(model: TextModel, runs: SelfTestRuns) -> None:
    """
    Lower what the model claims to the largest token id and the longest text that its graph takes.

    Raises InvalidBundleError for a graph that takes not even a short text of small ids.
    """
    random = np.random.default_rng(0)
    first_ids = min(_FIRST_IDS, model.vocabulary_size or _FIRST_IDS)

    async def try_length(length: int) -> ModelfleetError | None:
        return await _refusal(runs, random_tokens([length], first_ids, model.manifest.pad_token_id, random))

    async def try_id(token_id: int) -> ModelfleetError | None:
        length = min(model.max_tokens, _SHORT)
        ids = np.full(length, token_id, np.int32)
        return await _refusal(runs, Tokens.whole(ids, np.array([length], np.int32)))

    model.max_tokens = await _largest(model, "number of tokens", range(1, model.max_tokens + 1), try_length)
    if model.vocabulary_size is not None:
        model.vocabulary_size = 1 + await _largest(model, "token id", range(model.vocabulary_size), try_id)


async def _largest(
    model: TextModel, of: str, claimed: Sequence[int], refusal: Callable[[int], Awaitable[ModelfleetError | None]]
) -> int:
    """Return the largest that the graph takes: the last, or found by halves."""
    if not await refusal(claimed[-1]):
        return claimed[-1]
    if refused := await refusal(claimed[0]):
        raise InvalidBundleError(f"The graph fails where the {of} is {claimed[0]}: {cause(refused)}", field="model")
    taken, beyond = claimed[0], claimed[-1]
    while beyond - taken > 1:
        middle = (taken + beyond) // 2
        if await refusal(middle):
            beyond = middle
        else:
            taken = middle
    _log.warning("takes less than its files say", version=model.name, of=of, claimed=claimed[-1], taken=taken)
    return taken


async def _refusal(runs: SelfTestRuns, tokens: Tokens) -> ModelfleetError | None:
    (answer,) = (await runs.answers(tokens, tokens.lengths.tolist())).rows
    return answer if isinstance(answer, ModelfleetError) and not isinstance(answer, NotFiniteError) else None
