import json

import numpy as np
import pytest

from merging.errors import SelectionError
from search.subsets import dpp, dpp_kernel
from search.subsets.choose_subsets import Selection, select

NAMES = ("movie", "amazon", "nyt", "tweets")
Q = {"movie": 0.4, "amazon": 0.3, "nyt": 0.5, "tweets": 0.2}


@pytest.fixture
def similarity():
    rows = {name: np.random.default_rng(i).normal(size=(20, 6)) + 1 for i, name in enumerate(NAMES)}
    return dpp_kernel.similarity_from_representations(rows)


def test_map_gives_one_subset_a_size_and_ends_with_everyone(similarity):
    selection = select(NAMES, "dpp-map", quality=Q, similarity=similarity)
    assert [len(subset) for subset in selection.subsets] == [2, 3, 4]
    assert selection.subsets[-1] == tuple(sorted(NAMES))
    L = dpp_kernel.kernel([Q[name] for name in NAMES], similarity)
    for subset, value in zip(selection.subsets, selection.log_dets, strict=True):
        index = [NAMES.index(name) for name in subset]
        assert value == pytest.approx(np.linalg.slogdet(L[np.ix_(index, index)])[1])
        assert tuple(sorted(index)) == dpp.map_exact(L, len(index))
    assert selection.effective_rank == pytest.approx(dpp_kernel.effective_rank(similarity))
    assert selection.notes == []


def test_a_quality_of_unit_norm_shifts_log_det_by_size_and_selects_the_same(similarity):
    own = select(NAMES, "dpp-map", quality=Q, similarity=similarity)
    paper = select(NAMES, "dpp-map", quality=Q, similarity=similarity, unit=True)
    assert paper.subsets == own.subsets
    norm = np.log(np.linalg.norm(list(Q.values())))
    for subset, value, other in zip(own.subsets, own.log_dets, paper.log_dets, strict=True):
        assert other == pytest.approx(value - 2 * len(subset) * norm)
    assert paper.quality == own.quality == Q


def test_quality_similarity_and_log_det_are_told(similarity):
    selection = select(NAMES, "dpp-map", quality=Q, similarity=similarity)
    lines = selection.as_text()
    assert "effective rank" in lines[0]
    for name, row, line in zip(NAMES, similarity, lines[1:5], strict=True):
        assert line.split() == [name, f"{Q[name]:.4f}", *(f"{value:.3f}" for value in row)]
    assert [line.split()[3] for line in lines[5:]] == [f"{value:.3f}" for value in selection.log_dets]
    assert len(select(NAMES, "all").as_text()) == 1


def test_sizes_are_those_asked_for_and_everyone(similarity):
    selection = select(NAMES, "dpp-map", quality=Q, similarity=similarity, sizes=[3, 1, 3])
    assert [len(subset) for subset in selection.subsets] == [1, 3, 4]
    assert selection.subsets[0] == ("nyt",)  # alone, the best


def test_sampling_draws_different_subsets_of_each_size(similarity):
    selection = select(NAMES, "dpp-sample", quality=Q, similarity=similarity, draws=30, seed=5)
    assert len(set(selection.subsets)) == len(selection.subsets)
    assert {len(subset) for subset in selection.subsets} == {2, 3, 4}
    assert sum(len(subset) == 2 for subset in selection.subsets) > 1
    again = select(NAMES, "dpp-sample", quality=Q, similarity=similarity, draws=30, seed=5)
    assert again.subsets == selection.subsets


def test_members_without_quality_are_only_in_the_whole_pool(similarity):
    selection = select(NAMES, "dpp-map", quality={**Q, "amazon": 0.0}, similarity=similarity, notes=["dropped"])
    assert [subset for subset in selection.subsets if "amazon" in subset] == [tuple(sorted(NAMES))]
    assert selection.log_dets[-1] == -np.inf
    assert selection.notes[0] == "dropped"
    assert "rank 3" in selection.notes[1]


def test_all_and_fixed_need_no_statistics():
    everyone = select(NAMES, "all")
    assert everyone.subsets == [tuple(sorted(NAMES))]
    assert np.isnan(everyone.log_dets[0])
    fixed = select(NAMES, "fixed", subsets=[["nyt", "amazon"], ["amazon", "nyt"]])
    assert fixed.subsets == [("amazon", "nyt"), tuple(sorted(NAMES))]


def test_a_pool_of_one_member_is_its_own_selection():
    selection = select(["a"], "dpp-map", quality={"a": 0.1}, similarity=np.eye(1))
    assert selection.subsets == [("a",)]


def test_every_subset_is_listed_while_they_are_few(similarity):
    selection = select(NAMES, "every", quality=Q, similarity=similarity)
    assert len(selection.subsets) == len(set(selection.subsets)) == 6 + 4 + 1
    some = select(NAMES, "every", quality={**Q, "nyt": 0.0}, similarity=similarity, sizes=[2])
    assert [set(subset) & {"nyt"} for subset in some.subsets] == [set(), set(), set(), {"nyt"}]


def test_many_subsets_are_drawn_from_the_dpp():
    names = [f"m{i:03}" for i in range(300)]
    vectors = np.random.default_rng(0).normal(size=(300, 300))
    S = dpp_kernel.similarity_from_task_vectors(vectors @ vectors.T, names)
    selection = select(names, "every", quality=dict.fromkeys(names, 1.0), similarity=S, sizes=[2, 5])
    assert 200 < len(selection.subsets) <= 257
    assert {len(subset) for subset in selection.subsets} == {2, 5, 300}
    assert "too many to list: 128" in selection.notes[-1]
    L = dpp_kernel.kernel(np.ones(300), S)
    assert tuple(names[i] for i in dpp.map_subset(L, 5)) in selection.subsets
    greedy = select(names, "dpp-map", quality=dict.fromkeys(names, 1.0), similarity=S)
    assert [len(subset) for subset in greedy.subsets] == [*range(2, 17), 300]


def test_random_subsets_need_no_statistics():
    selection = select(NAMES, "random", draws=3, seed=1, sizes=[2, 3])
    assert {len(subset) for subset in selection.subsets} == {2, 3, 4}
    assert 4 <= len(selection.subsets) <= 7
    assert selection.subsets == select(NAMES, "random", draws=3, seed=1, sizes=[2, 3]).subsets
    assert selection.subsets != select(NAMES, "random", draws=3, seed=2, sizes=[2, 3]).subsets


@pytest.mark.parametrize("mode", ["dpp-map", "all"])
def test_a_selection_survives_its_file(similarity, mode):
    given = {"quality": {**Q, "nyt": 0.0}, "similarity": similarity} if mode == "dpp-map" else {}
    selection = select(NAMES, mode, **given)
    text = json.dumps(selection.as_dict(), allow_nan=False)
    read = Selection.from_dict(json.loads(text))
    assert read.as_dict() == selection.as_dict()
    assert read.subsets == selection.subsets
    np.testing.assert_array_equal(read.log_dets, selection.log_dets)


@pytest.mark.parametrize("value", [{}, {"names": 3}, [], {**select(NAMES, "all").as_dict(), "log_dets": ["x"]}])
def test_another_file_is_no_selection(value):
    with pytest.raises(SelectionError, match=r"selection\.json"):
        Selection.from_dict(value)


@pytest.mark.parametrize(
    ("names", "mode", "given", "words"),
    [
        ((), "all", {}, "different names"),
        (("a", "a"), "all", {}, "different names"),
        (NAMES, "dpp", {}, "unknown mode 'dpp'.*Did you mean 'dpp-map'"),
        (NAMES, "dpp-map", {}, "needs quality and similarity"),
        (NAMES, "dpp-sample", {"quality": Q}, "needs quality and similarity"),
        (NAMES, "dpp-map", {"quality": {"movie": 1.0}, "similarity": np.eye(4)}, "quality is of members"),
        (NAMES, "dpp-map", {"quality": Q, "similarity": np.eye(3)}, "shape"),
        (NAMES, "dpp-map", {"quality": Q, "similarity": np.eye(4), "sizes": [2, 5]}, r"sizes \[5\].*1 to 4"),
        (NAMES, "dpp-map", {"quality": dict.fromkeys(NAMES, 0.0), "similarity": np.eye(4)}, "every q is 0"),
        (NAMES, "fixed", {}, "needs subsets"),
        (NAMES, "fixed", {"subsets": [["movies"]]}, "'movies'.*Did you mean 'movie'"),
        (NAMES, "fixed", {"subsets": [["nyt", "nyt"]]}, "once"),
        (NAMES, "fixed", {"subsets": [[]]}, "at least one"),
    ],
)
def test_impossible_selections_are_errors(names, mode, given, words):
    with pytest.raises(SelectionError, match=words):
        select(names, mode, **given)
