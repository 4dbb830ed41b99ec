"""What the scheduler keeps, in pure Python: requests as blocks, the row planner and the rules of committing."""

from sglang_llada.blocks.planner import Plan, Row, RowKind, most_rows, next_step
from sglang_llada.blocks.request import Block, Ending, Phase, Request
from sglang_llada.blocks.table import Table

__all__ = ["Block", "Ending", "Phase", "Plan", "Request", "Row", "RowKind", "Table", "most_rows", "next_step"]
