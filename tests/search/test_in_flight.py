"""Whatever an evaluator answers becomes a row that the ledger can hold."""

import pytest

from merging.recipe import Recipe
from merging.tasks.task import Score
from search.candidate import Candidate, Measurement, Outcome, Provenance
from search.in_flight import InFlight, to_row
from search.ledger.ledger import Ledger
from search.objective import make_objective

CANDIDATE = Candidate(Recipe("average", {"a": 1.0}, {}))


class UnreadableError(Exception):
    def __str__(self):
        raise ValueError("no message")


def answer(value=0.5, error=0.1, examples=9, **fields):
    return Measurement({"one": Score(value, error, examples, "accuracy")}, **fields)


@pytest.mark.parametrize(
    ("measurement", "raised", "reported"),
    [
        (answer(examples=10**30), None, "cannot be recorded"),
        (answer(value="high"), None, "cannot be recorded"),
        (answer(value=10**400), None, "cannot be recorded"),
        (answer(value=2j), None, "cannot be recorded"),
        (answer(error="0.1"), None, "cannot be recorded"),
        (answer(report={"ridge\ud800": 1.0}), None, "cannot be recorded"),
        (answer(proxies={1: 1.0}), None, "cannot be recorded"),
        (answer(worker=b"\xff"), None, "cannot be recorded"),
        (None, RuntimeError("half a pair: \ud800, and a \0"), "half a pair: ?, and a ?"),
        (None, RuntimeError("401 for https://u:hunter2@h/x?token=hunter2"), "401 for https://***@h/x?token=***"),
        (None, RuntimeError("x" * 10**6), "RuntimeError: xxxx"),
        (None, UnreadableError(), "UnreadableError: (its message cannot be read)"),
        (None, None, "no measurement came back"),
    ],
)
@pytest.mark.parametrize("objective", [make_objective("mean", ["one"]), None])
def test_an_answer_that_no_row_holds_is_a_failed_candidate(tmp_path, measurement, raised, reported, objective):
    row = to_row(Outcome(CANDIDATE, measurement, raised), objective, Provenance("demo"))
    Ledger(str(tmp_path), "demo").append(row)
    (result,) = Ledger(str(tmp_path), "demo").rows()
    assert (result.status, reported in (result.error or "")) == ("failed", True), result.error
    assert len(result.error) <= 2000


class Loses:
    """Loses a candidate twice, then measures it; says what each attempt cost."""

    capacity = 1

    def __init__(self):
        self.attempts = []

    def submit(self, candidate):
        self.attempts.append(candidate)

    def wait(self, timeout):
        lost = len(self.attempts) < 3
        what = {"error": ValueError("gone")} if lost else {"measurement": answer()}
        return [Outcome(self.attempts[-1], lost=lost, cpu_hours=0.5, gpu_hours=0.25, **what)]


@pytest.mark.parametrize(("retries", "hours"), [(5, 1.5), (1, 1.0)])
def test_lost_attempts_are_part_of_what_a_candidate_cost(retries, hours):
    flight, final = InFlight(Loses(), retries), []
    flight.submit(CANDIDATE)
    while len(flight):
        final += flight.wait()
    row = to_row(final[0], None, Provenance("demo"))
    assert (row.cpu_hours, row.gpu_hours) == (hours, hours / 2)
    assert row.status == ("complete" if retries == 5 else "failed")
