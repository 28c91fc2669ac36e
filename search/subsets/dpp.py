"""Determinantal point processes: the better its members are and the more they differ, the likelier a subset.

The probability of a subset Y of fixed size k is det(L_Y) / e_k(L), e_k being the elementary symmetric
polynomial of L's eigenvalues; neither the norm of q nor any scale of L changes it.
"""

from collections.abc import Sequence
from itertools import combinations
from math import comb
from typing import Any

import numpy as np
import numpy.typing as npt

from merging.errors import SelectionError
from search.subsets.dpp_kernel import Matrix


def rank(matrix: Matrix) -> int:
    """Numerical rank: the largest k that a k-DPP over L can draw."""
    values = np.linalg.eigvalsh(matrix)
    return int((values > _threshold(values)).sum())


def _threshold(values: npt.NDArray[Any]) -> float:
    """Below it an eigenvalue is rounding; the same as dppy's own."""
    return float(values.max() * len(values) * np.finfo(np.float64).eps)


def log_determinant(matrix: Matrix, subset: Sequence[int]) -> float:
    """The logarithm of det(L_Y); −inf where that is 0."""
    index = list(subset)
    values = np.linalg.eigvalsh(matrix[np.ix_(index, index)])
    return float(np.log(values).sum()) if values[0] > _threshold(values) else float("-inf")


def log_determinants(matrix: Matrix, subsets: Sequence[Sequence[int]]) -> npt.NDArray[np.float64]:
    """`log_determinant` of many subsets, those of a size at once [subsets]."""
    values_of = np.empty(len(subsets))
    lengths = np.array([len(subset) for subset in subsets])
    for k in np.unique(lengths):
        places = np.flatnonzero(lengths == k).tolist()
        index = np.array([subsets[i] for i in places])
        values = np.linalg.eigvalsh(matrix[index[:, :, None], index[:, None, :]])
        singular = values[:, 0] <= values[:, -1] * k * np.finfo(np.float64).eps
        with np.errstate(invalid="ignore", divide="ignore"):
            values_of[places] = np.where(singular, -np.inf, np.log(values).sum(axis=1))
    return values_of


def map_exact(matrix: Matrix, k: int) -> tuple[int, ...]:
    """The subset of size k with the largest determinant, by enumeration; of equal ones the first.

    Raises:
        SelectionError: k exceeds the rank of L.
    """
    _check_size(matrix, k)
    best: tuple[int, ...] = ()
    best_value = -np.inf
    subsets = list(combinations(range(len(matrix)), k))
    for start in range(0, len(subsets), 4096):
        index = np.array(subsets[start : start + 4096])
        signs, values = np.linalg.slogdet(matrix[index[:, :, None], index[:, None, :]])
        values = np.where(signs > 0, values, -np.inf)
        top = int(values.argmax())
        if values[top] > best_value:
            best, best_value = subsets[start + top], float(values[top])
    if not best:
        raise _too_large(matrix, k)
    return best


def map_greedy(matrix: Matrix, k: int) -> tuple[int, ...]:
    """A subset of size k with a large determinant: the member that adds most, k times over, each in O(N k).

    Fast greedy MAP inference by an incremental Cholesky factor (Chen, Zhang & Zhou 2018, algorithm 1).

    Raises:
        SelectionError: k exceeds the rank of L.
    """
    return tuple(sorted(greedy_order(matrix, k)))


def greedy_order(matrix: Matrix, k: int, log_q: npt.NDArray[np.float64] | None = None) -> tuple[int, ...]:
    """`map_greedy` in the order of choice: its first j are the greedy subset of size j.

    Args:
        matrix: L [N, N]; or S, where q is given.
        k: Size.
        log_q: Logarithm of q [N], which may span more orders of magnitude than L = diag(q) S diag(q) could.

    Raises:
        SelectionError: k exceeds the rank of L.
    """
    _check_size(matrix, k)
    gains = matrix.diagonal().copy()
    weights = np.zeros(len(matrix)) if log_q is None else 2 * log_q
    factor = np.zeros((k, len(matrix)))
    chosen: list[int] = []
    for step in range(k):
        with np.errstate(divide="ignore", invalid="ignore"):
            best = int(np.nanargmax(np.log(gains) + weights))
        if gains[best] <= 0:
            raise _too_large(matrix, k)
        factor[step] = (matrix[best] - factor[:step, best] @ factor[:step]) / np.sqrt(gains[best])
        gains -= factor[step] ** 2
        chosen.append(best)
        gains = np.maximum(gains, 0.0)
        gains[chosen] = 0.0
    return tuple(chosen)


def map_subset(matrix: Matrix, k: int, exact_up_to: int = 20_000) -> tuple[int, ...]:
    """The subset of size k that a DPP holds most probable: exact while there are few subsets, greedy beyond.

    Args:
        matrix: L [N, N].
        k: Size.
        exact_up_to: As many subsets are enumerated.

    Raises:
        SelectionError: k exceeds the rank of L.
    """
    return map_exact(matrix, k) if comb(len(matrix), k) <= exact_up_to else map_greedy(matrix, k)


def sample_k_dpp(matrix: Matrix, k: int, seed: int, draws: int) -> list[tuple[int, ...]]:
    """Independent subsets of size k, each with probability det(L_Y) / e_k(L), by dppy's exact sampler.

    Args:
        matrix: L [N, N].
        k: Size.
        seed: Equal seeds draw equal subsets.
        draws: How many, repetitions included.

    Raises:
        SelectionError: k exceeds the rank of L.
    """
    from dppy.finite_dpps import (
        FiniteDPP,
    )  # brings matplotlib along: half a second that only sampling should pay

    values, vectors = np.linalg.eigh(matrix)
    values = np.where(values > _threshold(values), values, 0.0)
    if not 1 <= k <= np.count_nonzero(values):
        raise _too_large(matrix, k)
    # e_k then lies between 1 and C(N, k), whatever the scale of L: no overflow, no underflow.
    values /= np.exp(np.log(values[-k:]).mean())
    # A process of its own for each k: dppy keeps the polynomials of the first size that it is asked for.
    # Given the eigendecomposition it neither computes nor prints one.
    process: Any = FiniteDPP("likelihood", L_eig_dec=(values, vectors))
    state = np.random.RandomState(seed)
    subsets = []
    for _ in range(draws):
        subsets.append(tuple(sorted(process.sample_exact_k_dpp(size=k, random_state=state))))
        process.flush_samples()
    return subsets


def _check_size(matrix: Matrix, k: int) -> None:
    if not 1 <= k <= rank(matrix):
        raise _too_large(matrix, k)


def _too_large(matrix: Matrix, k: int) -> SelectionError:
    most = rank(matrix)
    return SelectionError(
        f"cannot select a subset of {k} members: the kernel of {len(matrix)} members has rank {most}; "
        f"ask for sizes from 1 to {most}, or for another similarity"
    )
