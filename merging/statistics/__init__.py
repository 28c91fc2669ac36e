"""What methods need to know of a member on its data: computed in shards, kept in publishable files."""

from merging.statistics.compute import measure, measure_shard, number_of_examples
from merging.statistics.fisher import Fisher
from merging.statistics.gram import Gram, GramSettings
from merging.statistics.likelihood import LikelihoodSettings
from merging.statistics.measurement import Measurement, Shard
from merging.statistics.output_gram import OutputGram, OutputGramSettings
from merging.statistics.representation import Representation, RepresentationSettings
from merging.statistics.statistic import STATISTICS, Block, Partial, Statistic, StatisticSettings
from merging.statistics.statistics_file import BLOCK_BYTES, StatisticsFile, save, save_blocks, save_tensors

__all__ = [
    "BLOCK_BYTES",
    "STATISTICS",
    "Block",
    "Fisher",
    "Gram",
    "GramSettings",
    "LikelihoodSettings",
    "Measurement",
    "OutputGram",
    "OutputGramSettings",
    "Partial",
    "Representation",
    "RepresentationSettings",
    "Shard",
    "Statistic",
    "StatisticSettings",
    "StatisticsFile",
    "measure",
    "measure_shard",
    "number_of_examples",
    "save",
    "save_blocks",
    "save_tensors",
]
