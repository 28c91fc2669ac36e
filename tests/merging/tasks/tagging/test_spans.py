import numpy as np
import pytest
from seqeval.metrics import f1_score
from seqeval.metrics.sequence_labeling import get_entities

from merging.tasks.tagging.spans import count, entities, f1

TAGS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]


def sentences(seed, count=40):
    g = np.random.default_rng(seed)
    return [[TAGS[n] for n in g.integers(0, len(TAGS), g.integers(1, 12))] for _ in range(count)]


def test_spans_are_seqevals():
    for tags in sentences(0, 300):
        assert entities(tags) == set(get_entities(tags)), tags


def test_f1_is_seqevals():
    true = sentences(1)
    g = np.random.default_rng(2)
    predicted = [[tag if g.random() < 0.7 else TAGS[g.integers(5)] for tag in tags] for tags in true]
    value, error = f1(count(true, predicted))
    assert value == pytest.approx(f1_score(true, predicted))
    assert 0 < error < 0.2


def test_tags_without_a_scheme_are_entities_of_one_word():
    assert entities(["NOUN", "NOUN", "O", "VERB"]) == {("NOUN", 0, 0), ("NOUN", 1, 1), ("VERB", 3, 3)}


def test_no_entities_are_worth_nothing():
    assert f1(count([["O", "O"]], [["O", "O"]]))[0] == 0.0
