import pytest
import sacrebleu

from merging.errors import TaskError
from merging.tasks.language.answers import contains, corpus_score, exact_match, extracted, number, rouge_l


def test_grades_of_single_answers():
    assert exact_match(" The  Cat\n", "the cat") == 1
    assert exact_match("the cat.", "the cat") == 0
    assert contains("It is Paris, of course.", "paris") == 1
    assert number("so 1,234.50 in all", "1234.5") == 1
    assert number("first 3, then 4", "3") == 0
    assert number("nothing", "3") == number("3", "nothing") == 0


def test_the_longest_common_subsequence_is_of_words():
    assert rouge_l("the cat sat", "the cat sat on the mat") == pytest.approx(2 * 3 / 9)
    assert rouge_l("mat the", "the mat") == pytest.approx(0.5)
    assert rouge_l("", "the mat") == 0


def test_what_is_extracted_is_the_last_match():
    assert extracted(r"answer: (\w+)", "answer: b, no, answer: c") == "c"
    assert extracted(r"[A-D]", "A or B") == "B"
    assert extracted(r"x", "A or B") == ""
    assert extracted(r"(x)?B", "A or B") == ""


def test_a_pattern_that_never_ends_is_refused():
    with pytest.raises(TaskError, match="backtracks without end"):
        extracted(r"(a|aa)+(x|y)\1$", "a" * 200)


@pytest.mark.parametrize("metric", ["chrf", "bleu"])
def test_corpus_scores_are_sacrebleus(metric):
    generated = ["the cat sat on the mat", "a dog ran home then", "no words are right here"]
    references = ["the cat sat on a mat", "a dog ran home again", "all of it is another text"]
    value, error = corpus_score(metric, generated, references)
    assert value == pytest.approx(getattr(sacrebleu, f"corpus_{metric}")(generated, [references]).score / 100)
    assert error > 0
