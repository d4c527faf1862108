"""Texts of log-normal length, the same in every run."""

import re

import numpy as np

MEDIAN_WORDS = 25
SIGMA = 0.8
SHORTEST, LONGEST = 3, 180
_SEED = 20260101

_WORDS = re.findall(
    r"\w+",
    "the of and to in a is that for it was on with as be by this are from or at which not have an but they his had her "
    "she their there been one all would when who will more out about up some time could them other than then its only "
    "over two these into any our new also after people year way day man thing woman life child world school state part "
    "family student group country problem hand place case week company system program question work night point home "
    "water room mother area money story fact month lot right study book eye job word business issue side kind head "
    "house service friend father power hour game line end member law car city community name president team you team",
)


def sample_texts(count: int) -> list[str]:
    """Return texts whose numbers of words are log-normal: median 25, sigma 0.8, from 3 to 180."""
    generator = np.random.default_rng(_SEED)
    lengths = np.exp(generator.normal(np.log(MEDIAN_WORDS), SIGMA, count)).round().clip(SHORTEST, LONGEST)
    return [" ".join(generator.choice(_WORDS, int(length))) for length in lengths]
