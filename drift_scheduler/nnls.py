"""Least squares with coefficients that must not be negative."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def nnls(matrix: Array, target: Array, *, tolerance: float = 1e-10) -> Array:
    """The x >= 0 that minimises |matrix @ x - target|. matrix [rows, columns], target [rows] ->
    [columns].

    The active set method of Lawson and Hanson ("Solving Least Squares Problems", chapter 23) for
    some tens of columns. Columns of any scale; one that is all zero gets 0.
    """
    norms = np.linalg.norm(matrix, axis=0)
    scale = np.where(norms > 0, norms, 1.0)
    scaled = matrix / scale
    columns = matrix.shape[1]
    solution = np.zeros(columns)
    free = np.zeros(columns, dtype=bool)
    limit = tolerance * max(1.0, float(np.linalg.norm(target)))
    for _ in range(3 * columns):
        gradient = scaled.T @ (target - scaled @ solution)
        gradient[free] = -np.inf
        entering = int(np.argmax(gradient))
        if gradient[entering] <= limit:
            break
        free[entering] = True
        solution = _descend(scaled, target, solution, free)
        # A column that leaves as soon as it has entered only has rounding to offer.
        if not free[entering]:
            break
    return solution / scale


def _descend(matrix: Array, target: Array, solution: Array, free: npt.NDArray[np.bool_]) -> Array:
    """The optimum over the free columns; those that would turn negative are taken out of `free`."""
    while True:
        trial = np.zeros_like(solution)
        trial[free] = np.linalg.lstsq(matrix[:, free], target, rcond=None)[0]
        blocked = free & (trial <= 0)
        if not blocked.any():
            return trial
        # As far towards the trial as everything stays non-negative.
        gap = solution[blocked] - trial[blocked]
        step = float(
            np.min(np.divide(solution[blocked], gap, out=np.zeros_like(gap), where=gap > 0))
        )
        solution = solution + step * (trial - solution)
        free &= solution > 1e-15
        solution[~free] = 0.0
        if not free.any():
            return solution
