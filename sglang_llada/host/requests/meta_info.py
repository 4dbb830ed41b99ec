"""What `meta_info` says of an answer beside the host's own fields, and how the host's tokenizer process puts it there.

The host appends what each output of a request brings, as it must for values that belong to tokens. Counts of the whole
request are said anew with each output and stand there as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

FORWARD_COUNTS = "dllm_forward_counts"
STEPS = "dllm_steps"
NFE = "dllm_nfe"
STEP_MAPS = "step_maps"
CONFIDENCES = "dllm_confidences"
SNAPSHOTS = "dllm_snapshots"
CHOICES = "dllm_choices"
WHOLE = {FORWARD_COUNTS, STEPS, NFE, CHOICES}  # of a request, not of its last output


def put_whole(
    append: Callable[..., None],
    manager: Any,
    meta_info: dict[str, Any],
    state: Any,
    customized_info: dict[str, list[Any]],
    index: int,
    finish_reason: Any,
) -> None:
    """Around the host's append: what is WHOLE goes into meta_info as it is."""
    others = {key: values for key, values in customized_info.items() if key not in WHOLE}
    append(manager, meta_info, state, others, index, finish_reason)
    whole = {key: customized_info[key][index] for key in WHOLE & customized_info.keys()}
    meta_info.update({key: value for key, value in whole.items() if value is not None})
