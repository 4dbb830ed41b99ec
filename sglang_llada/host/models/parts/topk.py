"""The host's choice of experts. Since 0.5.23 it finds out what an earlier one has to be given."""

from __future__ import annotations

from typing import Any

from sglang.srt.eplb.expert_location_dispatch import ExpertLocationDispatchInfo
from sglang.srt.layers.moe.topk import TopK, TopKOutputFormat
from sglang.srt.layers.moe.utils import get_moe_runner_backend
from torch import Tensor


class LaterTopK(TopK):
    """As the host has it."""

    def bind(self, experts: Any) -> None:
        """Tell the router who runs the experts."""
        self.bind_runner_backend(experts.runner_backend, routing_method_type=experts.routing_method_type)


class EarlierTopK(TopK):
    """The same on a host whose models hand over where experts are, and whose format is settled in each forward."""

    def bind(self, experts: Any) -> None:
        """Settle the format, for which our kernels ask; the host finds it in each forward, for these runners this."""
        runner = get_moe_runner_backend()
        if self.topk_config.output_format is None and (runner.is_auto() or runner.is_triton()):
            self.topk_config.output_format = TopKOutputFormat.STANDARD

    def routing_inputs(self) -> tuple[None, Any]:
        """Nothing of padding, whose experts are then run for nothing, and where the experts of this layer are."""
        return None, ExpertLocationDispatchInfo.init_new(layer_id=self.layer_id)

    def forward(self, x: Tensor, logits: Tensor) -> Any:
        """The experts of x [N, H] by logits [N, E], as ids that the expert layer knows."""
        _, locations = self.routing_inputs()
        return super().forward(x, logits, expert_location_dispatch_info=locations)


HostTopK = LaterTopK if hasattr(TopK, "bind_runner_backend") else EarlierTopK
