"""The kernel of a determinantal point process: quality q, similarity S, L = diag(q) S diag(q)."""

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from merging.errors import SelectionError

Matrix: TypeAlias = npt.NDArray[np.float64]

TOLERANCE = 1e-8
"""An eigenvalue of S this far below 0 is rounding; one further below is an error."""


def quality(scores: Mapping[str, float], base_scores: Mapping[str, float]) -> tuple[dict[str, float], list[str]]:
    """Relative gain of every member over the base: q = max(0, (score − base) / |base|).

    A determinant is blind to the sign of q: unclamped, a member worse than the base would look good. Where the base scores 0
    on some member's task, no relative gain is defined, and q is the plain gain of all members, which a note says.

    Args:
        scores: Member → its validation score on its own task.
        base_scores: Member → the base's score on the same examples.

    Returns:
        Member → q, and notes naming the members with q = 0, which no subset but the whole pool will hold.

    Raises:
        SelectionError: A base score is missing; a score is not finite; no member is better than the base.
    """
    gains: dict[str, float] = {}
    for name, score in scores.items():
        base = base_scores.get(name, float("nan"))
        if not np.isfinite(score) or not np.isfinite(base):
            raise SelectionError(
                f"quality of member '{name}' needs finite scores, not {score} (member) and {base} (base); "
                "evaluate both on its task, or set the selection's quality to 'equal'"
            )
        gains[name] = score - base
    flat = [name for name in gains if base_scores[name] == 0]
    if not flat:
        gains = {name: gain / abs(base_scores[name]) for name, gain in gains.items()}
    if not any(gain > 0 for gain in gains.values()):
        raise SelectionError(
            f"no member is better than the base on its own validation data ({', '.join(sorted(gains))}); "
            "set the selection's quality to 'equal', or the selection's mode to 'all'"
        )
    notes = [
        f"quality is the plain gain over the base, for the base scores 0 on the task of member '{name}', which no gain is "
        "relative to: where tasks' metrics are of different size, set the selection's quality to 'equal'"
        for name in flat[:1]
    ]
    notes += [
        f"member '{name}' is selected only where all members are: it scores {scores[name]:.4g} on its task, where the "
        f"base scores {base_scores[name]:.4g}"
        for name, gain in gains.items()
        if gain <= 0
    ]
    return {name: max(0.0, gain) for name, gain in gains.items()}, notes


def similarity_from_representations(
    rows: Mapping[str, npt.ArrayLike],
    centered: bool = False,
    positions: Mapping[str, npt.ArrayLike] | None = None,
) -> Matrix:
    """Mean over examples of the cosine between two members' representations of the same example.

    Args:
        rows: Member → representations [examples, D]; row i of every member is of the same example.
        centered: Subtract the members' mean representation of each example first, leaving how they differ.
        positions: Member → positions of its examples in their data [examples]; compared where given.

    Returns:
        S [N, N], members in the order of `rows`; unit diagonal, positive semi-definite.

    Raises:
        SelectionError: Members have other examples or dimensions, or a representation is not finite or is 0.
    """
    arrays = {name: np.asarray(value, dtype=np.float64) for name, value in rows.items()}
    _check_same_examples(arrays, positions or {})
    stack = np.stack(list(arrays.values()))
    if centered:
        scale = np.abs(stack).max()
        stack -= stack.mean(axis=0)
        stack[np.abs(stack) <= 1e-12 * scale] = 0.0
    norms = np.linalg.norm(stack, axis=2, keepdims=True)
    if (norms == 0).any():
        name = list(arrays)[int(np.argwhere(norms == 0)[0][0])]
        what = "all members represent an example alike" if centered else f"member '{name}' represents one by 0"
        raise SelectionError(f"cosines of representations are undefined: {what}; take similarity of task vectors")
    flat = (stack / norms).reshape(len(arrays), -1)
    return positive_semidefinite(flat @ flat.T / stack.shape[1])


def _check_same_examples(arrays: Mapping[str, Matrix], positions: Mapping[str, npt.ArrayLike]) -> None:
    """An average of cosines is positive semi-definite only where all members use the same examples."""
    if not arrays:
        raise SelectionError("similarity needs the representations of at least one member")
    first = next(iter(arrays))
    for name, value in arrays.items():
        if value.ndim != 2 or value.size == 0:
            raise SelectionError(
                f"representations of member '{name}' have shape {list(value.shape)}, not [examples, D]"
            )
        if not np.isfinite(value).all():
            raise SelectionError(f"representations of member '{name}' hold NaN or Inf; compute them again")
        if value.shape != arrays[first].shape:
            raise SelectionError(
                f"representations of member '{name}' have shape {list(value.shape)}, those of '{first}' "
                f"{list(arrays[first].shape)}; compute them on the same examples with models of one width"
            )
        if positions and not np.array_equal(np.asarray(positions.get(name)), np.asarray(positions.get(first))):
            raise SelectionError(
                f"representations of members '{first}' and '{name}' are of different examples; compute them on the same"
            )


def similarity_from_task_vectors(gram: npt.ArrayLike, names: Sequence[str]) -> Matrix:
    """Cosine between the members' task vectors.

    Args:
        gram: Inner products of the task vectors [N, N].
        names: The N members, for messages.

    Returns:
        S [N, N]; unit diagonal, positive semi-definite.

    Raises:
        SelectionError: The matrix is no Gram matrix, or a member equals the base.
    """
    products = np.asarray(gram, dtype=np.float64)
    if products.shape != (len(names), len(names)):
        raise SelectionError(f"inner products of {len(names)} task vectors have shape {list(products.shape)}")
    lengths = np.sqrt(np.maximum(products.diagonal(), 0.0))
    for name, length in zip(names, lengths, strict=True):
        if length == 0:
            raise SelectionError(f"the task vector of member '{name}' is 0: it equals the base; leave it out")
    return positive_semidefinite(products / np.outer(lengths, lengths))


def positive_semidefinite(matrix: npt.ArrayLike) -> Matrix:
    """The matrix made symmetric, its eigenvalues within rounding below 0 set to 0.

    Raises:
        SelectionError: It is not square or not finite, or has an eigenvalue below −1e-8.
    """
    square = np.asarray(matrix, dtype=np.float64)
    if square.ndim != 2 or square.shape[0] != square.shape[1]:
        raise SelectionError(f"a similarity matrix must be square, not of shape {list(square.shape)}")
    if not np.isfinite(square).all():
        raise SelectionError("the similarity matrix holds NaN or Inf; compute the statistics again")
    symmetric = (square + square.T) / 2
    values, vectors = np.linalg.eigh(symmetric)
    if values[0] < -TOLERANCE:
        raise SelectionError(
            f"the similarity matrix is not positive semi-definite (eigenvalue {values[0]:.3g}); compute "
            "every pair of members on the same examples"
        )
    if values[0] >= 0:
        return symmetric
    clipped = (vectors * np.maximum(values, 0.0)) @ vectors.T
    return np.asarray((clipped + clipped.T) / 2)


def effective_rank(matrix: Matrix) -> float:
    """How many members S tells apart: N if all differ, 1 if all are alike.

    The exponential of the entropy of the normalised eigenvalues (Roy & Vetterli 2007).
    """
    values = np.maximum(np.linalg.eigvalsh(matrix), 0.0)
    shares = values[values > 0] / values.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


def kernel(q: npt.ArrayLike, similarity: Matrix) -> Matrix:
    """L = diag(q) S diag(q) [N, N].

    Raises:
        SelectionError: q is not N finite numbers ≥ 0 with one above 0.
    """
    weights = np.asarray(q, dtype=np.float64)
    if weights.shape != similarity.shape[:1] or not np.isfinite(weights).all() or (weights < 0).any():
        raise SelectionError(f"q must be {len(similarity)} finite numbers of at least 0, not {weights.tolist()}")
    if not weights.any():
        raise SelectionError("every q is 0: no member can be selected; use equal quality")
    return similarity * np.outer(weights, weights)
