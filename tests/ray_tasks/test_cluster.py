import pytest

from ray_tasks.cluster import Cluster, room_for


@pytest.mark.parametrize(
    ("memory", "gpus", "room"),
    [
        (40_000, 0.0, 4),  # as many as have memory
        (400_000, 0.0, 16),  # as have a core
        (1_000, 0.0, 1),  # one is always tried
        (0, 0.0, 16),  # nothing is known of memory
        (40_000, 0.5, 8),  # a GPU's evaluators are counted by GPUs
    ],
)
def test_a_cluster_of_several_nodes_has_room_for_what_its_memory_holds(memory, gpus, room):
    cluster = Cluster("127.0.0.1:6379", nodes=2, cpus=16, gpus=4.0, memory=memory)
    assert room_for(cluster, threads=1, gpus=gpus, bytes_each=10_000) == room
