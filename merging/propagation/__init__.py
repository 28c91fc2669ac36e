"""RegMean propagated (no labels, no search): the members are run beside the merged model, layer by layer."""

from merging.propagation.layerwise import Fit, Propagation, propagate
from merging.propagation.settings import PropagationSettings

__all__ = ["Fit", "Propagation", "PropagationSettings", "propagate"]
