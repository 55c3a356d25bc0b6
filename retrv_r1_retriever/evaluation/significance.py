"""Whether a difference between two runs over the same queries is more than chance: two paired tests, both seeded.

The bootstrap draws queries with replacement: how would the mean differ over other queries of this kind? The randomisation test
swaps the two runs query by query: how often would two equal systems differ this much? (Smucker, Allan and Carterette 2007.)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from retrv_r1_retriever.errors import InputError, explain

SAMPLES = 10_000
_CHUNK = 2_000_000  # numbers drawn at a time: memory stays the same with any number of queries


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean with the 2.5 % and 97.5 % quantiles of its bootstrap distribution."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class PairedTest:
    """difference: of the means, second minus first, with its interval; p: of the two-sided randomisation test

    better, worse: queries on which the second run is better or worse; the others are equal
    """

    difference: Interval
    p: float
    better: int
    worse: int


def bootstrap(values: Sequence[float], *, samples: int = SAMPLES, seed: int = 0) -> Interval:
    """Percentile bootstrap over queries. Raises `InputError` for no values, or NaN."""
    given = _checked(values)
    rng = np.random.default_rng(seed)
    means = [given[rng.integers(len(given), size=(n, len(given)))].mean(axis=1) for n in _chunks(samples, len(given))]
    low, high = np.quantile(np.concatenate(means), (0.025, 0.975))
    return Interval(float(given.mean()), float(low), float(high))


def paired_test(
    first: Sequence[float], second: Sequence[float], *, samples: int = SAMPLES, seed: int = 0
) -> PairedTest:
    """`first[i]` and `second[i]` are of the same query."""
    if len(first) != len(second):
        got = f"{len(first)} and {len(second)}"
        raise InputError(explain("paired test", expected="values of the same queries", got=got, fix="Align them."))
    differences = _checked(second) - _checked(first)
    return PairedTest(
        bootstrap(differences.tolist(), samples=samples, seed=seed),
        _randomisation(differences, samples, seed),
        int((differences > 0).sum()),
        int((differences < 0).sum()),
    )


def _randomisation(differences: np.ndarray, samples: int, seed: int) -> float:
    """Share of sign patterns with a mean at least as far from 0; the observed one counts, so p is never 0."""
    rng = np.random.default_rng(seed)
    moved = differences[differences != 0]  # the others keep their 0 whatever the sign
    observed = abs(moved.sum()) - 1e-12 * max(1.0, float(np.abs(moved).sum()))
    extreme = sum(
        int((np.abs((1 - 2.0 * rng.integers(2, size=(n, len(moved)))) @ moved) >= observed).sum())
        for n in _chunks(samples, len(moved))
    )
    return (extreme + 1) / (samples + 1)


def _chunks(samples: int, width: int) -> Iterator[int]:
    size = max(1, _CHUNK // max(1, width))
    return (min(size, samples - start) for start in range(0, samples, size))


def _checked(values: Sequence[float]) -> np.ndarray:
    if not len(values) or not all(map(math.isfinite, values)):
        got = "none" if not len(values) else "NaN or infinity"
        raise InputError(explain("values", expected="one finite number per query", got=got, fix="Check the runs."))
    return np.asarray(values, dtype=np.float64)
