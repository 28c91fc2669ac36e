import pytest

from flows.campaign.open_campaign import open_campaign
from flows.campaign.regime import require_fit, require_model, require_room, require_room_for_a_model
from flows.config.campaign_file import load_campaign
from flows.directory.progress import Display
from merging.errors import ClusterError
from merging.evaluation.memory import EvaluatorMemory
from ray_tasks.connect import LOCAL, Cluster

GB = 10**9


def test_a_model_that_fits_no_evaluator_is_refused_with_its_bytes_and_what_would():
    large = EvaluatorMemory(parameters=70, models=282 * GB, pool=0, waiting=141 * GB)
    with pytest.raises(
        ClusterError,
        match=r"gpus: 1 would hold 141 GB on one GPU \(of models 141, .*has 80 GB for it: set resources.gpus: 2$",
    ):
        require_fit(large, 1.0, 80 * GB)
    require_fit(large, 2.0, 80 * GB)
    require_fit(large, 1.0, 0)
    resident = EvaluatorMemory(parameters=7, models=27 * GB, pool=121 * GB, waiting=0)
    with pytest.raises(ClusterError, match=r"has 40 GB for it: set resources.gpus: 4 or resources.regime: sharded"):
        require_fit(resident, 0.5, 40 * GB)


def test_an_engine_s_weights_are_spread_and_what_is_merged_beside_it_lies_on_the_first_gpu():
    resident = EvaluatorMemory(parameters=13, models=52 * GB, pool=50 * GB, waiting=0, engine=28 * GB)
    require_fit(resident, 2.0, 90 * GB)
    with pytest.raises(
        ClusterError, match=r"would hold 90 GB .*set resources.gpus and engine.tensor_parallel: 7 or resources.regime"
    ):
        require_fit(resident, 2.0, 80 * GB)
    fed = EvaluatorMemory(parameters=70, models=282 * GB, pool=0, waiting=141 * GB, engine=146 * GB)
    require_fit(fed, 2.0, 141 * GB)  # what waits to be handed over lies in main memory
    with pytest.raises(ClusterError, match=r"would hold 73 GB .*has 40 GB .*engine.tensor_parallel: 4$"):
        require_fit(fed, 2.0, 40 * GB)


def test_without_gpus_what_no_node_holds_is_refused_and_mapped_files_do_not_count():
    large = EvaluatorMemory(parameters=7, models=54 * GB, pool=1000 * GB, waiting=27 * GB, engine=30 * GB)
    with pytest.raises(
        ClusterError,
        match=r"holds 84 GB \(models 27, candidates that wait 27, engine 30\), and no node has more than 83 GB for it: take "
        r"nodes of 84 GB, a smaller engine.cache",
    ):
        require_room(large, 83 * GB)
    require_room(large, 84 * GB)
    require_room(large, 0)


def test_a_model_that_one_device_does_not_hold_is_refused_where_it_is_not_spread():
    with pytest.raises(
        ClusterError, match=r"distillation holds 112 GB in one process \(4 × 7 billion .* 1 GPU has 80 GB"
    ):
        require_model("distillation", 7 * GB, 4, 1.0, 80 * GB)
    with pytest.raises(ClusterError, match=r"a statistic holds 280 GB .* the node with most has 256 GB for it$"):
        require_model("a statistic", 70 * GB, 1, 0.0, 256 * GB)
    require_model("a statistic", 7 * GB, 1, 1.0, 80 * GB)
    require_model("a statistic", 70 * GB, 1, 1.0, 0)


def test_a_campaign_s_own_model_is_looked_at(campaign_file, monkeypatch):
    opened = open_campaign(load_campaign(str(campaign_file(resources={"gpus": 0}))), Display())
    cluster = Cluster(LOCAL, 1, 2, 0.0)
    require_room_for_a_model(opened, cluster, "distillation", 4)
    monkeypatch.setattr("flows.campaign.regime.most_memory", lambda *_: 1000)
    with pytest.raises(ClusterError, match="distillation holds .* the node with most has 1e-06 GB"):
        require_room_for_a_model(opened, cluster, "distillation", 4)
    require_room_for_a_model(opened, cluster, "measuring")  # float32 weights are mapped from their file
