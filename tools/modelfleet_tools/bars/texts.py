"""Texts of log-normal length, the same in every run."""

import re
from dataclasses import dataclass

import numpy as np

_SEED = 20260101


@dataclass(frozen=True, slots=True)
class WordCounts:
    """Log-normal numbers of words a text: `median` and `sigma` of the logarithm, cut off at both ends."""

    median: float = 25
    sigma: float = 0.8
    shortest: int = 3
    longest: int = 180


DEFAULT = WordCounts()

_WORDS = re.findall(
    r"\w+",
    "the of and to in a is that for it was on with as be by this are from or at which not have an but they his had her "
    "she their there been one all would when who will more out about up some time could them other than then its only "
    "over two these into any our new also after people year way day man thing woman life child world school state part "
    "family student group country problem hand place case week company system program question work night point home "
    "water room mother area money story fact month lot right study book eye job word business issue side kind head "
    "house service friend father power hour game line end member law car city community name president team you team",
)


def sample_texts(count: int, words: WordCounts = DEFAULT) -> list[str]:
    """Return texts of so many words, by default log-normal with the median 25 and sigma 0.8, from 3 to 180."""
    generator = np.random.default_rng(_SEED)
    lengths = np.exp(generator.normal(np.log(words.median), words.sigma, count)).round()
    lengths = lengths.clip(words.shortest, words.longest)
    return [" ".join(generator.choice(_WORDS, int(length))) for length in lengths]
