"""mergekit's YAML as a recipe: what each of its keys is here, or one error that names those that cannot be expressed."""

from flows.config.mergekit.files import from_mergekit, load_translated
from flows.config.mergekit.translation import Translated, is_mergekit, is_passthrough, translate

__all__ = ["Translated", "from_mergekit", "is_mergekit", "is_passthrough", "load_translated", "translate"]
