"""RegMean propagated: each layer fitted to the members' outputs on the inputs that the merged model delivers."""

from merging.methods.least_squares.precomputed import Solved
from merging.methods.method import register


@register
class RegMeanPropagated(Solved):
    """The layer-by-layer solution of `merging.propagation` for these very members, scaled as a whole; see `Solved`."""

    name = "regmean_propagated"
    summary = "least squares, layer by layer, on the inputs that the merged model delivers"
    solution = "propagated"
