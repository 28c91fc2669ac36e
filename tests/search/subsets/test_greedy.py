from itertools import combinations

import pytest

from merging.errors import SelectionError
from search.subsets.greedy import greedy_forward, greedy_soup, ranked_prefixes

WORTH = {"a": 3.0, "b": 2.0, "c": -1.0, "d": 1.0}


class Judge:
    """Members have a worth each; a and b disagree."""

    def __init__(self, clash=0.0, broken=()):
        self.asked = []
        self.clash, self.broken = clash, broken

    def __call__(self, subsets):
        self.asked += subsets
        return [None if set(self.broken) & set(subset) else self.value(subset) for subset in subsets]

    def value(self, subset):
        return sum(WORTH[name] for name in subset) - self.clash * ({"a", "b"} <= set(subset))


def test_forward_ends_where_nothing_does_good():
    judge = Judge()
    assert greedy_forward("abcd", judge) == [("a",), ("a", "b"), ("a", "b", "d")]
    assert len(judge.asked) == 4 + 3 + 2 + 1
    assert judge.value(("a", "b", "d")) == max(judge.value(Y) for k in range(1, 5) for Y in combinations("abcd", k))


def test_forward_looks_at_every_member_at_every_step():
    assert greedy_forward("abcd", Judge(clash=5.0)) == [("a",), ("a", "d")]
    assert greedy_forward("abcd", Judge(clash=5.0), most=4)[-2:] == [("a", "c", "d"), ("a", "b", "c", "d")]


def test_soup_keeps_what_does_no_harm():
    judge = Judge(clash=5.0)
    assert greedy_soup("dcba", judge) == ("a", "d")
    assert len(judge.asked) == 7
    assert greedy_soup("abcd", Judge(clash=2.0)) == ("a", "b", "d")  # b neither helps nor harms


def test_what_fails_is_passed_by():
    assert greedy_forward("abcd", Judge(broken="a")) == [("b",), ("b", "d")]
    assert greedy_soup("abcd", Judge(broken="a")) == ("b", "d")
    assert ranked_prefixes("abcd", Judge(broken="a")) == [("b",), ("b", "d"), ("b", "c", "d")]


def test_prefixes_are_in_the_order_of_single_scores():
    judge = Judge(clash=5.0)
    assert ranked_prefixes("dcba", judge) == [("a",), ("a", "b"), ("a", "b", "d"), ("a", "b", "c", "d")]
    assert judge.asked == [("d",), ("c",), ("b",), ("a",)]


@pytest.mark.parametrize("select", [greedy_forward, greedy_soup, ranked_prefixes])
def test_nothing_to_begin_with_is_an_error(select):
    with pytest.raises(SelectionError, match="no member could be merged"):
        select("abcd", Judge(broken="abcd"))
