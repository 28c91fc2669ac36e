import numpy as np
import pytest

from merging.errors import SelectionError
from search.subsets import dpp_kernel


@pytest.fixture
def rows():
    generator = np.random.default_rng(0)
    shared = generator.normal(size=(12, 5))
    return {name: shared + 0.3 * generator.normal(size=(12, 5)) for name in ("amazon", "movie", "nyt")}


def test_quality_is_the_relative_gain():
    q, notes = dpp_kernel.quality({"a": 0.9, "b": 0.75}, {"a": 0.6, "b": 0.5})
    assert q == pytest.approx({"a": 0.5, "b": 0.5})
    assert notes == []


def test_quality_of_scores_below_zero_grows_with_them():
    q, notes = dpp_kernel.quality({"a": -10.0, "b": -19.0, "worse": -30.0}, dict.fromkeys(("a", "b", "worse"), -20.0))
    assert q == pytest.approx({"a": 0.5, "b": 0.05, "worse": 0.0})
    assert len(notes) == 1


def test_quality_drops_and_names_members_worse_than_the_base():
    q, notes = dpp_kernel.quality({"a": 0.9, "worse": 0.4}, {"a": 0.6, "worse": 0.5})
    assert q["worse"] == 0.0
    assert len(notes) == 1
    assert "'worse'" in notes[0]


def test_a_base_that_scores_0_leaves_plain_gains():
    q, notes = dpp_kernel.quality({"a": 0.9, "b": 0.75}, {"a": 0.0, "b": 0.5})
    assert q == {"a": pytest.approx(0.9), "b": pytest.approx(0.25)}
    assert "plain gain" in notes[0]
    assert "'a'" in notes[0]


@pytest.mark.parametrize(
    ("scores", "base", "words"),
    [
        ({"a": 0.9}, {}, "'a'.*finite"),
        ({"a": float("nan")}, {"a": 0.5}, "'a'.*finite"),
        ({"a": 0.4, "b": 0.5}, {"a": 0.5, "b": 0.5}, "no member is better.*a, b.*equal"),
    ],
)
def test_quality_without_a_meaning_is_an_error(scores, base, words):
    with pytest.raises(SelectionError, match=words):
        dpp_kernel.quality(scores, base)


@pytest.mark.parametrize("centered", [False, True])
def test_similarity_is_the_mean_cosine_of_the_same_examples(rows, centered):
    S = dpp_kernel.similarity_from_representations(rows, centered)
    stack = np.stack(list(rows.values()))
    if centered:
        stack = stack - stack.mean(axis=0)
    for i, one in enumerate(stack):
        for j, other in enumerate(stack):
            cosines = [a @ b / np.sqrt((a @ a) * (b @ b)) for a, b in zip(one, other, strict=True)]
            assert S[i, j] == pytest.approx(np.mean(cosines), abs=1e-12)
    assert np.linalg.eigvalsh(S)[0] > -1e-12


def test_centring_tells_alike_members_apart(rows):
    plain = dpp_kernel.similarity_from_representations(rows)
    centered = dpp_kernel.similarity_from_representations(rows, centered=True)
    assert dpp_kernel.effective_rank(plain) < 1.7 < dpp_kernel.effective_rank(centered)


def test_similarity_refuses_other_examples(rows):
    positions = {name: np.arange(12) for name in rows}
    same = dpp_kernel.similarity_from_representations(rows, positions=positions)
    assert same.shape == (3, 3)
    with pytest.raises(SelectionError, match=r"'amazon' and 'nyt'.*different examples"):
        dpp_kernel.similarity_from_representations(rows, positions={**positions, "nyt": np.arange(12)[::-1]})
    with pytest.raises(SelectionError, match=r"'movie'.*\[11, 5\].*same examples"):
        dpp_kernel.similarity_from_representations({**rows, "movie": rows["movie"][:11]})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"nyt": np.full((12, 5), np.nan)}, "'nyt' hold NaN"),
        ({"nyt": np.zeros((12, 5))}, "'nyt' represents one by 0"),
        ({"nyt": np.zeros(12)}, r"'nyt' have shape \[12\]"),
    ],
)
def test_similarity_refuses_unusable_representations(rows, change, words):
    with pytest.raises(SelectionError, match=words):
        dpp_kernel.similarity_from_representations({**rows, **change})


def test_centred_similarity_of_equal_members_is_an_error(rows):
    with pytest.raises(SelectionError, match="alike"):
        dpp_kernel.similarity_from_representations({"a": rows["nyt"], "b": rows["nyt"]}, centered=True)
    with pytest.raises(SelectionError, match="at least one"):
        dpp_kernel.similarity_from_representations({})


def test_similarity_of_task_vectors_is_their_cosine():
    vectors = np.random.default_rng(1).normal(size=(3, 40)) * np.array([[1.0], [10.0], [0.1]])
    S = dpp_kernel.similarity_from_task_vectors(vectors @ vectors.T, ["a", "b", "c"])
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    np.testing.assert_allclose(S, unit @ unit.T, atol=1e-12)


def test_a_member_equal_to_the_base_has_no_cosine():
    with pytest.raises(SelectionError, match=r"'b'.*equals the base"):
        dpp_kernel.similarity_from_task_vectors(np.diag([1.0, 0.0]), ["a", "b"])
    with pytest.raises(SelectionError, match="shape"):
        dpp_kernel.similarity_from_task_vectors(np.eye(3), ["a", "b"])


def test_rounding_below_zero_is_clipped_and_more_is_an_error():
    rounded = np.ones((2, 2))
    rounded[0, 1] = 1 + 1e-9
    cleaned = dpp_kernel.positive_semidefinite(rounded)
    np.testing.assert_array_equal(cleaned, cleaned.T)
    assert np.linalg.eigvalsh(cleaned)[0] >= -1e-15
    with pytest.raises(SelectionError, match="not positive semi-definite"):
        dpp_kernel.positive_semidefinite(np.array([[1.0, 1.1], [1.1, 1.0]]))
    with pytest.raises(SelectionError, match="square"):
        dpp_kernel.positive_semidefinite(np.ones((2, 3)))
    with pytest.raises(SelectionError, match="NaN"):
        dpp_kernel.positive_semidefinite(np.full((2, 2), np.nan))


def test_effective_rank_runs_from_one_to_n():
    assert dpp_kernel.effective_rank(np.ones((4, 4))) == pytest.approx(1.0)
    assert dpp_kernel.effective_rank(np.eye(4)) == pytest.approx(4.0)


def test_kernel_scales_similarity_by_quality():
    S = np.array([[1.0, 0.5], [0.5, 1.0]])
    np.testing.assert_allclose(dpp_kernel.kernel([2.0, 3.0], S), [[4.0, 3.0], [3.0, 9.0]])


@pytest.mark.parametrize("q", [[1.0], [1.0, -1.0], [1.0, float("nan")], [0.0, 0.0]])
def test_kernel_refuses_unusable_quality(q):
    with pytest.raises(SelectionError, match="q"):
        dpp_kernel.kernel(q, np.eye(2))
