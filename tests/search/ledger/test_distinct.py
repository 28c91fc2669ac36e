from search.ledger.distinct import distinct
from search.ledger.row import Row


def row(name, losses, method="ties", members=("a", "b"), score=0.5):
    return Row("demo", name, "validation", "search", "complete", method, members, scores={"x": score}, losses=losses)


def test_the_first_of_equal_merges_stays():
    rows = [
        row("first", {"x": 0.7123456}),
        row("rounded otherwise", {"x": 0.71234561}),
        row("other loss", {"x": 0.71236}),
        row("other method", {"x": 0.7123456}, method="average"),
        row("other members", {"x": 0.7123456}, members=("a", "c")),
        row("other score", {"x": 0.7123456}, score=0.6),
    ]
    names = ["first", "other loss", "other method", "other members", "other score"]
    assert [kept.candidate for kept in distinct(rows)] == names
    assert [kept.candidate for kept in distinct(rows[1::-1])] == ["rounded otherwise"]


def test_without_a_loss_merges_are_taken_to_differ():
    rows = [row("a", {}), row("b", {}), row("c", {"x": float("nan")}), row("d", {"x": float("nan")})]
    assert distinct(rows) == rows
