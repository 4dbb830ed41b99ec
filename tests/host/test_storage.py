"""The name of a model's weights: the same for the same ones, another one for whatever differs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sglang_llada.host.engine import storage
from sglang_llada.host.engine.storage import fingerprint

pytestmark = pytest.mark.host


def model(dtype: torch.dtype = torch.bfloat16) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Embedding(5, 8)).to(dtype)


@torch.no_grad()
@pytest.mark.parametrize("chunk", [1 << 22, 7])
def test_any_difference_of_weights_is_one_of_names(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "CHUNK", chunk)
    changed = {
        "a bit": lambda weight: weight.view(torch.int16)[3, 3].bitwise_xor_(1),
        "a sign": lambda weight: weight[0, 0].neg_(),
        "two rows": lambda weight: weight.copy_(weight.flip(0)),
        "two columns": lambda weight: weight.copy_(weight.flip(1)),
    }
    names = [fingerprint(model()), fingerprint(model(torch.float16)), fingerprint(model()[:1])]
    for change in changed.values():
        other = model()
        change(other[0].weight)
        names.append(fingerprint(other))
    assert len({*names}) == len(names)
    assert fingerprint(model()) == names[0]


def test_weights_in_any_format_have_a_name() -> None:
    holder = nn.Module()
    for dtype in (torch.float8_e4m3fn, torch.int8, torch.int64, torch.float32):
        holder.register_parameter(
            str(dtype).partition(".")[2], nn.Parameter(torch.ones(3, 2).to(dtype), requires_grad=False)
        )
    assert len(fingerprint(holder)) == 16
