"""What runs within each of vLLM's worker processes: a candidate's weights, taken in buckets.

These are the steps of vLLM's own weight transfer (`start_weight_update`, `update_weights`, `finish_weight_update`), for tensors
that are handed over by `collective_rpc`.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor


class BucketLoader:
    """Methods that vLLM adds to its workers (`worker_extension_cls`)."""

    vllm_config: Any
    model_runner: Any

    def begin_candidate(self) -> None:
        """Has every layer wait for its weights."""
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        with set_current_vllm_config(self.vllm_config):
            initialize_layerwise_reload(self.model_runner.get_model())

    def take_bucket(self, weights: Sequence[tuple[str, Tensor]]) -> None:
        """Takes some weights by their names in the checkpoint; a layer is renewed when it has all of its own."""
        from vllm.config import set_current_vllm_config

        with set_current_vllm_config(self.vllm_config):
            self.model_runner.get_model().load_weights(iter(weights))

    def end_candidate(self) -> None:
        """Renews what is left."""
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        with set_current_vllm_config(self.vllm_config):
            finalize_layerwise_reload(self.model_runner.get_model(), self.vllm_config.model_config)
