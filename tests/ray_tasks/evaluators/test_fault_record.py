"""Which answers are errors of the machine, and what follows from several of them."""

from datetime import UTC, datetime

import pytest

from merging.errors import ClusterError, MethodError
from ray_tasks.evaluators.evaluator import Answer, failed
from ray_tasks.evaluators.faults import FaultRecord

NOW = datetime(2026, 1, 1, tzinfo=UTC)
CUDA = "AcceleratorError: CUDA error: an illegal memory access was encountered"


@pytest.mark.parametrize(
    ("answer", "fault"),
    [
        (failed(MemoryError(), "worker", NOW), True),
        (failed(MethodError("α cancel the denominator"), "worker", NOW), False),
        (Answer(None, CUDA, "worker", NOW), True),  # as a shard's error comes, a text
        (Answer(None, CUDA, "worker", NOW, lost=True), False),
        (Answer(None, "MethodError: α cancel the denominator", "worker", NOW), False),
        (Answer(None, None, "worker", NOW), False),
    ],
)
def test_an_answer_tells_by_kind_or_text_whether_its_error_is_the_machine_s(answer, fault):
    assert answer.fault is fault


def test_a_candidate_fails_at_its_second_error_and_what_another_node_measures_blames_the_first():
    record = FaultRecord()
    assert record.nodes("1") is None
    assert record.add("1", "left", f"{CUDA}\nTraceback") is False
    assert record.nodes("1") == ["left"]
    assert record.answered("1", "sound one") == {"left"}
    assert (record.last_error, record.sound, record.nodes("1")) == (CUDA, {"sound one"}, None)
    assert [record.add("2", node, CUDA) for node in ("left", "right")] == [False, True]
    record.forget_evaluator("sound one")
    assert record.sound == set()


def test_candidate_after_candidate_tells_of_all_machines_unless_one_answers():
    record = FaultRecord()

    def fail(ticket):
        for node in ("left", "right"):
            record.add(ticket, node, CUDA)

    fail("1")
    fail("2")
    assert record.answered("3", "sound one") == set()
    fail("4")
    fail("5")
    with pytest.raises(ClusterError, match=r"3 candidates in a row .*, each on 2 evaluators[^$]*--retry-failed"):
        fail("6")
