"""The program from Python: run a campaign, merge a recipe, read a ledger.

    import mergequest as mq

    print(mq.run(mq.load_campaign("my.yaml", ["search.candidates=200"])))
    mq.merge("recipe.yaml", "merged")
    frame = mq.load_ledger("runs/my-campaign")

Names are imported when they are first used: importing this package costs nothing.
"""

TYPE_CHECKING = False  # `typing` itself is not imported: beside `python -m mergequest` there may be one of the user's
if TYPE_CHECKING:
    from typing import Any

    from flows.campaign.run import check, run
    from flows.cli.merge import merge_recipe as merge
    from flows.config.campaign_file import load_campaign
    from merging.errors import MergequestError
    from search.ledger.frame import best_by_method, candidates
    from search.ledger.frame import load as load_ledger

__all__ = [  # noqa: RUF022  # in the order in which they are used, and shown in docs/api.md
    "load_campaign",
    "check",
    "run",
    "merge",
    "load_ledger",
    "candidates",
    "best_by_method",
    "MergequestError",
]

_PLACES = {
    "load_campaign": "flows.config.campaign_file:load_campaign",
    "check": "flows.campaign.run:check",
    "run": "flows.campaign.run:run",
    "merge": "flows.cli.merge:merge_recipe",
    "load_ledger": "search.ledger.frame:load",
    "candidates": "search.ledger.frame:candidates",
    "best_by_method": "search.ledger.frame:best_by_method",
    "MergequestError": "merging.errors:MergequestError",
}


def __getattr__(name: str) -> "Any":
    """Imports a name of the package when it is first used."""
    if name not in _PLACES:
        raise AttributeError(f"module 'mergequest' has no attribute '{name}'")
    from importlib import import_module

    module, _, attribute = _PLACES[name].partition(":")
    value = globals()[name] = getattr(import_module(module), attribute)
    return value


def __dir__() -> list[str]:
    return [*globals(), *__all__]
