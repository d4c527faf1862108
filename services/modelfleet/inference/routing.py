"""Which of an alias's versions answers a request: shares that are exact in the long run, or sticky by a key."""

import hashlib
from collections.abc import Sequence

from modelfleet.inference.assignment import WeightedVersion

_MANTISSA_BITS = 53  # all that a float in [0, 1) holds


class Choice:
    """
    Chooses between the targets of one alias.

    Without a key targets take smooth weighted turns (as nginx balances): of any run of requests as long as the sum of
    the weights, each target has exactly its weight, evenly spread. With two targets the share of one is never off by a
    whole request.
    """

    def __init__(self, targets: Sequence[WeightedVersion]) -> None:
        self.targets = tuple(targets)
        self._total = sum(target.weight for target in targets)
        self._credits = [0] * len(self.targets)

    def next(self) -> int:
        """Return the number of the version whose turn it is."""
        if len(self.targets) == 1:
            return self.targets[0].model_version
        for index, target in enumerate(self.targets):
            self._credits[index] += target.weight
        chosen = max(range(len(self.targets)), key=self._credits.__getitem__)
        self._credits[chosen] -= self._total
        return self.targets[chosen].model_version

    def at(self, point: float) -> int:
        """Return the number of the version that has a point of [0, 1), which targets share in their order."""
        left = point * self._total
        for target in self.targets:
            left -= target.weight
            if left < 0:
                return target.model_version
        return self.targets[-1].model_version

    def largest(self) -> int:
        """Return the number of the version with the largest weight; that takes no turn."""
        return max(self.targets, key=lambda target: target.weight).model_version


def affinity_point(model: str, alias: str, key: str) -> float:
    """
    Return a key's point of [0, 1): the same in every process, evenly spread over keys.

    Model and alias are part of it, so that it is not always the same callers who try what is new.
    """
    digest = hashlib.blake2b(f"{model}@{alias}\0{key}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest) >> (64 - _MANTISSA_BITS)) / 2.0**_MANTISSA_BITS
