"""The report's figures: pure functions of the rows of a ledger; None where there is nothing to see."""

from flows.figures.beside import beside
from flows.figures.front import front
from flows.figures.members import profile, share, similarity
from flows.figures.search import history, importance, scaling
from flows.figures.style import Looks
from flows.figures.timing import seconds, timeline

__all__ = [
    "Looks",
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
