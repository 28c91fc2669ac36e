"""Names that mergekit has for methods which are here under another name, or with a parameter."""

from collections.abc import Mapping

from merging.recipe import Value

MERGEKIT_NAMES: Mapping[str, tuple[str, Mapping[str, Value]]] = {
    "dare_linear": ("dare", {"entries": "all"}),
    "dare_ties": ("dare", {"entries": "elected"}),
    "della_linear": ("della", {"entries": "all"}),
    "breadcrumbs_ties": ("breadcrumbs", {"entries": "elected"}),
    "multislerp": ("multi_slerp", {}),
    "ramplus_tl": ("ram_plus", {}),
}
"""mergekit's name → the method, and parameters that are part of the name."""


def hint(name: str) -> str | None:
    """What a name of mergekit's is here; None of any other."""
    if name not in MERGEKIT_NAMES:
        return None
    method, parameters = MERGEKIT_NAMES[name]
    settings = ", ".join(f"`{key}: {value}`" for key, value in parameters.items())
    return f"It is mergekit's name of '{method}'{f' with {settings}' if settings else ''}."
