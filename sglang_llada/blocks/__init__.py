"""What the scheduler keeps, in pure Python: requests as blocks, the row planner and the rules of committing."""

from sglang_llada.blocks.block import Block, Decided, Rules
from sglang_llada.blocks.filling import Filling, prefixes
from sglang_llada.blocks.planner import Plan, Row, RowKind, most_rows, next_step
from sglang_llada.blocks.request import Ending, Phase, Request
from sglang_llada.blocks.table import Table

__all__ = [
    "Block",
    "Decided",
    "Ending",
    "Filling",
    "Phase",
    "Plan",
    "Request",
    "Row",
    "RowKind",
    "Rules",
    "Table",
    "most_rows",
    "next_step",
    "prefixes",
]
