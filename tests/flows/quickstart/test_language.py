import random

import pandas as pd
import pytest

from flows.quickstart.language import (
    GENRES,
    TOPICS,
    Gloss,
    Question,
    definitions,
    frames,
    genres,
    glosses,
    topics,
    word_classes,
)
from merging.errors import StorageError

LICENCE = "  1 This software and database is being provided\n"
ENTRIES = (
    '00000001 05 n 02 gray_wolf 0 timber_wolf 0 001 @ 02086723 n 0000 | a wolf; "it howled"  \n'
    "00000002 13 n 01 broth(p) 0 000 | a thin soup  \n"
    "00000003 03 n 01 entity 0 000 | that which is  \n"
)
TAGGED = {
    f"c{letter}{number:02}": "".join(
        f"The/at {word}/jj man/nn slowly/rb saw/vbd {name}{number}/np ,/, again/rb ./.\n" for word in ("old", "new")
    )
    for letter, name in zip("adjp", ("Ann", "Bob", "Cid", "Dan"), strict=True)
    for number in range(3)
}


def test_glosses():
    assert glosses(LICENCE + ENTRIES) == [Gloss("gray wolf", "animal", "a wolf"), Gloss("broth", "food", "a thin soup")]


def test_glosses_refuse_another_form():
    with pytest.raises(StorageError, match="line 2 is no entry of WordNet"):
        glosses(LICENCE + "00000001 05 n 02 gray_wolf\n")


def test_word_classes_and_genres():
    for question in word_classes(TAGGED, random.Random(0)):
        word = question.prompt.split('"')[1]
        assert question.choices[question.label] == {
            "old": "adjective", "new": "adjective", "man": "noun", "saw": "verb", "slowly": "adverb", "again": "adverb"
        }[word]  # fmt: skip
        assert question.prompt.split("\n")[0].endswith(", again.")
    result = genres({name: text for name, text in TAGGED.items() if name != "cj02"}, random.Random(0))
    assert len(result) == 2 * 2 * len(GENRES)
    assert all(GENRES[question.choices[question.label]] == question.group[1] for question in result)


@pytest.fixture
def nouns() -> list[Gloss]:
    return [Gloss(f"{topic} {i}", topic, f"text of {topic} {i}") for topic in TOPICS.values() for i in range(6)]


def test_topics_are_balanced(nouns):
    result = topics([noun for noun in nouns if noun.word != "food 0"], random.Random(0))
    assert pd.Series([question.choices[question.label] for question in result]).value_counts().tolist() == [5] * 4
    assert all(question.choices[question.label] in question.prompt for question in result)


def test_definitions_have_one_right_choice_of_four(nouns):
    result = definitions(nouns, random.Random(0))
    assert len(result) == 12
    for question in result:
        assert len(set(question.choices)) == 4
        assert f"text of {question.choices[question.label]}\n" in question.prompt
        assert len({choice.split()[0] for choice in question.choices}) == 1
    assert {question.label for question in result} == {0, 1, 2, 3}


def test_frames_keep_groups_apart():
    questions = [Question(str(i % 9), f"prompt {i % 80}", ("a", "b"), 0) for i in range(160)]
    parts = frames(questions, {"train": 12, "validation": 4, "test": 8})
    assert [len(part) for part in parts.values()] == [12, 4, 8]
    assert pd.concat(parts.values())["prompt"].is_unique
