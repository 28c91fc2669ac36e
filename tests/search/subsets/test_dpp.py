from collections import Counter
from itertools import combinations

import numpy as np
import pytest
from scipy.stats import chisquare

from merging.errors import SelectionError
from search.subsets import dpp

SAMPLERS = [dpp.map_exact, dpp.map_greedy, lambda L, k: dpp.sample_k_dpp(L, k, seed=0, draws=1)]


def random_kernel(n, rank, seed):
    factor = np.random.default_rng(seed).normal(size=(n, rank))
    return factor @ factor.T


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_exact_map_has_the_largest_determinant(seed, k):
    L = random_kernel(7, 7, seed)
    determinants = {Y: np.linalg.det(L[np.ix_(Y, Y)]) for Y in combinations(range(7), k)}
    assert dpp.map_exact(L, k) == max(determinants, key=determinants.__getitem__)


def test_enumeration_in_blocks_finds_the_same():
    L = random_kernel(16, 16, 3)  # 8,008 subsets of six: more than one block
    best = max(combinations(range(16), 6), key=lambda Y: np.linalg.slogdet(L[np.ix_(Y, Y)])[1])
    assert dpp.map_exact(L, 6) == best


@pytest.mark.parametrize("k", [1, 3, 6])
def test_greedy_is_exact_on_a_diagonal_kernel(k):
    L = np.diag([3.0, 0.5, 7.0, 1.0, 2.0, 9.0])
    assert dpp.map_greedy(L, k) == dpp.map_exact(L, k)


@pytest.mark.parametrize("seed", range(8))
def test_greedy_takes_the_member_that_adds_most(seed):
    L = random_kernel(9, 9, seed)
    chosen: list[int] = []
    for k in range(1, 6):
        rest = [i for i in range(9) if i not in chosen]
        chosen.append(max(rest, key=lambda i: np.linalg.det(L[np.ix_([*chosen, i], [*chosen, i])])))
        assert dpp.map_greedy(L, k) == tuple(sorted(chosen))


def test_map_enumerates_few_and_is_greedy_beyond():
    # Greedy starts with member 0, the longest; the exact pair is the two orthogonal ones.
    vectors = np.array([[0.8, 0.8], [1.0, 0.0], [0.0, 1.0]])
    L = vectors @ vectors.T
    assert dpp.map_subset(L, 2) == (1, 2)
    assert dpp.map_subset(L, 2, exact_up_to=1) == dpp.map_greedy(L, 2) == (0, 1)


@pytest.mark.parametrize("scale", [1e-120, 1e120])
def test_scale_of_the_kernel_changes_nothing(scale):
    L = random_kernel(6, 6, 4)
    assert dpp.rank(L * scale) == 6
    assert dpp.map_exact(L * scale, 3) == dpp.map_exact(L, 3)
    assert dpp.map_greedy(L * scale, 3) == dpp.map_greedy(L, 3)
    assert dpp.sample_k_dpp(L * scale, 3, 0, 50) == dpp.sample_k_dpp(L, 3, 0, 50)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_k_dpp_draws_each_subset_as_often_as_its_determinant_says(k):
    L = random_kernel(5, 5, 2)
    subsets = list(combinations(range(5), k))
    weights = np.array([np.linalg.det(L[np.ix_(Y, Y)]) for Y in subsets])
    draws = 4000
    counts = Counter(dpp.sample_k_dpp(L, k, seed=7, draws=draws))
    expected = draws * weights / weights.sum()
    likely = expected >= 5  # Pearson's test holds for cells that are expected to be hit; the rest are one cell
    observed = np.array([counts[Y] for Y in subsets])
    cells = [*observed[likely], observed[~likely].sum()], [*expected[likely], expected[~likely].sum() + 1e-9]
    assert sum(counts.values()) == draws
    assert chisquare(cells[0], np.array(cells[1]) * draws / sum(cells[1])).pvalue > 0.01


def test_draws_depend_on_the_seed_and_nothing_else(capsys):
    L = random_kernel(8, 8, 0)
    first = dpp.sample_k_dpp(L, 3, seed=1, draws=20)
    assert first == dpp.sample_k_dpp(L, 3, seed=1, draws=20)
    assert first != dpp.sample_k_dpp(L, 3, seed=2, draws=20)
    assert all(len(set(subset)) == 3 and list(subset) == sorted(subset) for subset in first)
    assert capsys.readouterr().out == ""


def test_spectra_of_many_sizes_are_drawn_from():
    L = np.diag(np.logspace(-7, 7, 60))
    subset = dpp.sample_k_dpp(L, 40, seed=0, draws=1)[0]
    assert len(subset) == 40
    assert set(range(30, 60)) <= set(subset)


def test_log_determinant_of_a_singular_subset_is_minus_infinity():
    L = random_kernel(4, 2, 0)
    assert dpp.log_determinant(L, (0, 1)) == pytest.approx(np.log(np.linalg.det(L[:2, :2])))
    assert dpp.log_determinant(L, (0, 1, 2)) == -np.inf


@pytest.mark.parametrize("select", SAMPLERS)
@pytest.mark.parametrize("k", [0, 3, 5])
def test_a_size_beyond_the_rank_is_an_error(select, k):
    L = random_kernel(4, 2, 0)
    with pytest.raises(SelectionError, match=f"subset of {k} members.*rank 2.*from 1 to 2"):
        select(L, k)
