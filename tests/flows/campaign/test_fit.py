import pytest

from flows.campaign.regime import require_fit
from merging.errors import ClusterError
from merging.evaluation.memory import EvaluatorMemory


def test_a_model_that_fits_no_evaluator_is_refused_with_its_bytes_and_what_would():
    large = EvaluatorMemory(parameters=70, models=282 * 10**9, pool=0, waiting=141 * 10**9)
    with pytest.raises(
        ClusterError, match=r"holds 141 GB \(models 141, .*its 1 GPUs have 80 GB: set resources.gpus: 2$"
    ):
        require_fit(large, 1.0, 80 * 10**9)
    require_fit(large, 2.0, 160 * 10**9)
    require_fit(large, 1.0, 0)
    resident = EvaluatorMemory(parameters=7, models=27 * 10**9, pool=121 * 10**9, waiting=0)
    with pytest.raises(
        ClusterError, match=r"its 0.5 GPUs have 40 GB: set resources.gpus: 2 or resources.regime: sharded"
    ):
        require_fit(resident, 0.5, 40 * 10**9)
