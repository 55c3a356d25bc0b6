"""Tests whose answer is known: exhaustive sign patterns, the bootstrap's own mean, no difference."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from retrv_r1_retriever.errors import InputError
from retrv_r1_retriever.evaluation.significance import bootstrap, paired_test


def test_the_randomisation_test_agrees_with_all_sign_patterns() -> None:
    first, second = [0.0, 0.2, 0.5, 0.1, 0.3, 0.9, 0.4], [0.5, 0.1, 0.9, 0.6, 0.3, 1.0, 0.4]
    differences = np.subtract(second, first)
    patterns = np.array(list(itertools.product((1, -1), repeat=7)))
    exact = float((np.abs(patterns @ differences) >= abs(differences.sum()) - 1e-9).mean())
    found = paired_test(first, second, samples=40_000)
    assert found.p == pytest.approx(exact, abs=0.01)
    assert (found.better, found.worse) == (4, 1)
    assert found.difference.mean == pytest.approx(differences.mean())


def test_the_bootstrap_interval_is_that_of_the_normal_approximation_for_many_queries() -> None:
    values = np.random.default_rng(1).random(4_000)
    found = bootstrap(values.tolist(), samples=4_000)
    error = values.std() / np.sqrt(len(values))
    assert found.low == pytest.approx(found.mean - 1.96 * error, abs=0.15 * error)
    assert found.high == pytest.approx(found.mean + 1.96 * error, abs=0.15 * error)
    assert found == bootstrap(values.tolist(), samples=4_000), "seeded"


def test_equal_runs_do_not_differ() -> None:
    found = paired_test([0.5, 1.0], [0.5, 1.0], samples=100)
    assert (found.p, found.difference.low, found.difference.high) == (1.0, 0.0, 0.0)


@pytest.mark.parametrize("values", [[], [0.1, float("nan")]])
def test_what_cannot_be_averaged_is_refused(values: list[float]) -> None:
    with pytest.raises(InputError, match="expected one finite number per query, got"):
        bootstrap(values)
    with pytest.raises(InputError, match="expected values of the same queries, got 1 and 2"):
        paired_test([0.1], [0.1, 0.2])
