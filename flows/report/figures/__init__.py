"""The report's figures: pure functions of the rows of a ledger; None where there is nothing to see."""

from flows.report.figures.generalisation import beside
from flows.report.figures.members import profile, share, similarity
from flows.report.figures.pareto import front
from flows.report.figures.search_history import history, importance, scaling
from flows.report.figures.style import Palette
from flows.report.figures.timing import seconds, timeline

__all__ = [
    "Palette",
    "beside",
    "front",
    "history",
    "importance",
    "profile",
    "scaling",
    "seconds",
    "share",
    "similarity",
    "timeline",
]
