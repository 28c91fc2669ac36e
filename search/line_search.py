"""Before a sampler proposes: the best baseline with all its factors larger or smaller, as far as that helps."""

from collections.abc import Callable, Iterator
from dataclasses import replace

from merging.methods.method import METHODS
from merging.recipe import Recipe
from search.ledger.row import Row
from search.objective import best, is_candidate
from search.space.search_space import Space

DIRECTIONS = ((1.25, 1.5, 2.0, 3.0), (0.75, 0.5))
"""By what the baseline's factors are multiplied, one after the other, as long as each merge is better than the one before."""


class LineSearch:
    """A search along one line of the space, that of the best baseline's factors: none of it has to be prepared anew.

    A shared factor is what the defaults are wrong about most often, and what a sampler that varies a factor of every
    member finds last.

    Args:
        space: What may be proposed.
        row_of: The row of a recipe; None while there is none.
    """

    def __init__(self, space: Space, row_of: Callable[[Recipe], Row | None]) -> None:
        self._space, self._row_of = space, row_of
        self._baselines = space.baselines()
        self.left = sum(map(len, DIRECTIONS))
        """How many recipes there may be behind the frontier; 0 once there is none any more."""

    def frontier(self) -> list[Recipe]:
        """The next recipe in each direction that has not ended, without a row; none while baselines are without one."""
        if not self._baselines:
            return []
        rows = [row for recipe in self._baselines if (row := self._row_of(recipe))]
        if len(rows) < len(self._baselines):
            return []
        ranked = best(rows, len(rows), rows[0].split)
        start = next((row for row in ranked if any(any(self._line(row, times)) for times in DIRECTIONS)), None)
        ahead = [found for times in DIRECTIONS if start and (found := self._ahead(start, times))]
        if not ahead:
            self._baselines = []
        self.left = sum(len(found) - 1 for found in ahead)
        return [found[0] for found in ahead]

    def _line(self, start: Row, times: tuple[float, ...]) -> Iterator[Recipe]:
        """The recipes in one direction, as far as they are in the space; none where a common factor cancels."""
        if METHODS[start.method].scale_free:
            return
        for factor in times:
            scaled = {key: factor * value for key, value in start.recipe.scaling.items()}
            recipe = replace(start.recipe, scaling=scaled)
            if recipe not in self._space or recipe.identity == start.candidate:  # factors of 0
                return
            yield recipe

    def _ahead(self, start: Row, times: tuple[float, ...]) -> list[Recipe]:
        """The recipes of a direction from the first that has no row; none where one before it was not better."""
        last, line = start, list(self._line(start, times))
        for place, recipe in enumerate(line):
            row = self._row_of(recipe)
            if row is None:
                return line[place:]
            if not is_candidate(row, start.split) or best([last, row], split=start.split) == [last]:
                return []
            last = row
        return []
