"""What a decode step decides, in pure torch: one file per algorithm, all under the step contract of contract.py.

Adding an algorithm is one file, one line in ALGORITHMS, its parameters in config.py, and, unless it inserts, a branch
in decide_triton.rows_kernel, which tests hold against these.
"""

from __future__ import annotations

from sglang_llada.decode import joint_threshold, levenshtein, run, threshold
from sglang_llada.decode.contract import Algorithm

ALGORITHMS: dict[str, Algorithm] = {
    "threshold": Algorithm(step=threshold.step, source="LLaDA2.0"),
    "joint_threshold": Algorithm(step=joint_threshold.step, source="LLaDA2.1"),
    "levenshtein": Algorithm(step=levenshtein.step, source="LLaDA2.2", indel=True),
    "run": Algorithm(step=run.step, source="structured output"),
}
