"""What candidates cost, in words."""

from collections.abc import Iterable

from search.ledger.row import Row


def cost_in_words(rows: Iterable[Row]) -> str:
    """`3.2 GPU hours, 12.8 CPU hours for 120 candidates`; empty where no row says what it cost."""
    counted = [row for row in rows if row.cpu_hours is not None]
    hours = hours_in_words(sum(row.cpu_hours or 0.0 for row in counted), sum(row.gpu_hours or 0.0 for row in counted))
    return f"{hours} for {len(counted)} measurements" if hours else ""


def hours_in_words(cpu: float, gpu: float) -> str:
    """`3.2 GPU hours, 12.8 CPU hours`; empty where there are none."""
    return ", ".join(f"{hours:.3g} {kind} hours" for kind, hours in (("GPU", gpu), ("CPU", cpu)) if hours)
