"""How much of each source an epoch holds: shares by weight, instead of as many as there are."""

from collections.abc import Sequence

import numpy as np


class Mixture:
    """The order of the examples of several sources, epoch by epoch.

    An epoch has as many examples as all sources together, and of each source the share that its weight says. A source
    gives its examples in turn, in an order that is drawn anew whenever all have had theirs: at the end of any epoch no
    two examples of a source differ by more than one in how often they came. What an epoch holds is a pure function of
    (sources, weights, seed, epoch).

    Args:
        sources: of each of n examples, which source it is from, counted from 0.
        weights: above 0, one for each source.
        seed: of the orders.

    Raises:
        ValueError: a source has no examples, or its share is less than one example of an epoch.
    """

    def __init__(self, sources: Sequence[int], weights: Sequence[float], seed: int):
        self._seed = seed
        self._members = [np.flatnonzero(np.asarray(sources) == source) for source in range(len(weights))]
        shares = np.asarray(weights, np.float64) / np.sum(weights)
        ends = np.rint(np.cumsum(shares) * len(sources)).astype(int)
        self.counts = np.diff(ends, prepend=0).tolist()
        """Examples of each source in an epoch."""
        for source, (members, count) in enumerate(zip(self._members, self.counts, strict=True)):
            if not members.size or not count:
                raise ValueError(
                    f"source {source} of the mixture gives {count} of {len(sources)} examples of an epoch and has "
                    f"{members.size}; expected at least one of each: raise its weight or leave it out"
                )

    @property
    def sizes(self) -> list[int]:
        """Examples that each source has."""
        return [members.size for members in self._members]

    def order(self, epoch: int, rng: np.random.Generator) -> np.ndarray:
        """Returns the examples of an epoch, [n], shuffled; a `plan.Order`."""
        drawn = [self._drawn(source, epoch) for source in range(len(self._members))]
        return rng.permutation(np.concatenate(drawn))

    def _drawn(self, source: int, epoch: int) -> np.ndarray:
        """The examples of a source whose turn is in an epoch."""
        members, count = self._members[source], self.counts[source]
        start = epoch * count
        first, last = start // members.size, -(-(start + count) // members.size)
        rounds = [np.random.default_rng((self._seed, source, r)).permutation(members) for r in range(first, last)]
        return np.concatenate(rounds)[start - first * members.size :][:count]
