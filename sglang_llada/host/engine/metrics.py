"""What the host's Prometheus endpoint says of block rows, beside the host's own metrics.

| metric | what is counted |
|---|---|
| `sglang:llada_steps_total` | forwards; `how` is `replayed` (by a CUDA graph) or `eager` |
| `sglang:llada_rows_total` | their rows; `kind` is `fill`, `denoise` or `seal`, `how` as above |
| `sglang:llada_tokens_per_forward` | of each request that ended: returned tokens by the forwards it took part in |
| `sglang:llada_forwards_per_block` | of each block of those: the decode steps made on it |
| `sglang:llada_failed_requests_total` | requests that ended for an error, theirs or ours |
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from sglang_llada.blocks import Plan, Request

TOKENS_PER_FORWARD = (0.5, 1, 1.5, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 28, 32)
FORWARDS_PER_BLOCK = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 28, 32, 40, 48)


class Metrics:
    """Counters and histograms with the labels of a scheduler's own."""

    def __init__(self, labels: dict[str, Any]) -> None:
        import prometheus_client as prometheus  # reads at import where the host wants its files

        names = list(labels)
        steps = prometheus.Counter("sglang:llada_steps_total", "Forwards.", [*names, "how"])
        rows = prometheus.Counter("sglang:llada_rows_total", "Rows of forwards.", [*names, "kind", "how"])
        tokens = prometheus.Histogram(
            "sglang:llada_tokens_per_forward",
            "Returned tokens by forwards of each ended request.",
            names,
            buckets=TOKENS_PER_FORWARD,
        )
        forwards = prometheus.Histogram(
            "sglang:llada_forwards_per_block",
            "Decode steps of each block of ended requests.",
            names,
            buckets=FORWARDS_PER_BLOCK,
        )
        failed = prometheus.Counter("sglang:llada_failed_requests_total", "Requests that ended for an error.", names)
        self.labels, self.steps, self.rows, self.failed = labels, steps, rows, failed.labels(**labels)
        self.tokens, self.forwards = tokens.labels(**labels), forwards.labels(**labels)

    def step(self, plan: Plan, *, replayed: bool) -> None:
        """Count a launched step."""
        how = "replayed" if replayed else "eager"
        self.steps.labels(**self.labels, how=how).inc()
        for kind, count in Counter(row.kind for row in plan.rows).items():
            self.rows.labels(**self.labels, kind=kind.name.lower(), how=how).inc(count)

    def ended(self, request: Request[Any], returned: int) -> None:
        """Count a request that is over, and `returned` tokens long."""
        if request.forwards:
            self.tokens.observe(returned / request.forwards)
        for steps in request.steps_of_blocks:
            self.forwards.observe(steps)
