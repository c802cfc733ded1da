from __future__ import annotations

import itertools

import numpy as np
import pytest

from drift_scheduler.nnls import nnls


def by_brute_force(matrix, target):
    """The best residual over all sets of columns that may differ from zero."""
    best = float(np.linalg.norm(target))
    columns = range(matrix.shape[1])
    for size in range(1, matrix.shape[1] + 1):
        for chosen in itertools.combinations(columns, size):
            part = matrix[:, chosen]
            x = np.linalg.lstsq(part, target, rcond=None)[0]
            if (x >= 0).all():
                best = min(best, float(np.linalg.norm(part @ x - target)))
    return best


@pytest.mark.parametrize("seed", range(25))
def test_as_good_as_the_best_of_all_active_sets(seed):
    rng = np.random.default_rng(seed)
    rows, columns = int(rng.integers(3, 12)), int(rng.integers(1, 8))
    # Columns of very different scales, as token counts and their squares are.
    matrix = rng.normal(size=(rows, columns)) * 10.0 ** rng.integers(-4, 8, size=columns)
    target = rng.normal(size=rows)
    x = nnls(matrix, target)
    assert (x >= 0).all()
    assert np.linalg.norm(matrix @ x - target) <= by_brute_force(matrix, target) + 1e-9


def test_exact_coefficients_come_back():
    rng = np.random.default_rng(0)
    matrix = np.abs(rng.normal(size=(30, 6)))
    x = np.array([0.0, 2.0, 0.0, 3.5, 1e-3, 0.0])
    np.testing.assert_allclose(nnls(matrix, matrix @ x), x, atol=1e-9)


def test_equal_and_empty_columns_do_no_harm():
    column = np.array([1.0, 2.0, 3.0])
    matrix = np.stack([column, column, np.zeros(3)], axis=1)
    x = nnls(matrix, 4 * column)
    assert x[0] + x[1] == pytest.approx(4)
    assert x[2] == 0
