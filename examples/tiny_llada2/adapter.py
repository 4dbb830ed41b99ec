"""Train an adapter (LoRA) that teaches a tiny checkpoint one more task; a few minutes on one core:

    python -m examples.tiny_llada2.adapter --task double --out examples/tiny-llada2-double

The loss is train.py's. The checkpoint stays as it is: what learns are two small matrices beside each matrix of
attention, of the dense layer and of the shared experts, written as PEFT writes them.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from examples.tiny_llada2.tasks import ADDED_TASKS, Example, one_of
from examples.tiny_llada2.train import Data, FusedExperts
from sglang_llada.llada2.adapters import CONFIG_FILE, PREFIX, TARGETS
from sglang_llada.llada2.reference import MoE
from sglang_llada.llada2.weights import load_reference
from sglang_llada.progress import say, watched

CHECKPOINT = Path("examples/tiny-llada2")
RATE = 4e-3
KEPT = 8  # steps of the checkpoint's own tasks: one in so many, so that they are not forgotten


class Adapted(nn.Module):
    """A linear layer that stays, and what is added to it."""

    def __init__(self, base: nn.Linear, rank: int, scaling: float) -> None:
        super().__init__()
        self.base, self.scaling = base.requires_grad_(False), scaling
        self.a = nn.Parameter(torch.randn(rank, base.in_features) * base.in_features**-0.5)
        self.b = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + F.linear(F.linear(x, self.a), self.b) * self.scaling


def adapt(model: nn.Module, rank: int, scaling: float) -> dict[str, Adapted]:
    """Put an Adapted in the place of each linear layer that may have one; all of them by their names."""
    found = {}
    for path, module in list(model.named_modules()):
        parent, _, leaf = path.rpartition(".")
        if isinstance(module, nn.Linear) and leaf in TARGETS:
            found[path] = Adapted(module, rank, scaling)
            setattr(model.get_submodule(parent), leaf, found[path])
    return found


def sources(task: str, seed: int) -> Iterator[Example]:
    """Examples of the new task and, one in KEPT, of those that the checkpoint knows."""
    rng = random.Random(f"{seed}/{task}")
    while True:
        yield one_of(rng, task if rng.randrange(KEPT) else None)


def main() -> None:
    """Train for a number of steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=ADDED_TASKS, default="double")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--tokens", type=int, default=2048, help="positions of a batch")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)

    tokenizer, model = (
        PreTrainedTokenizerFast.from_pretrained(CHECKPOINT),
        load_reference(CHECKPOINT).requires_grad_(False),
    )
    for layer in model.model.layers:
        if isinstance(layer.mlp, MoE):
            layer.mlp = FusedExperts(layer.mlp).requires_grad_(False)
    adapted = adapt(model, args.rank, scaling=2.0)
    params = [p for p in model.parameters() if p.requires_grad]
    adam = torch.optim.AdamW(params, lr=RATE, weight_decay=0.0)

    end_id = tokenizer.convert_tokens_to_ids("<|role_end|>")
    ids = (tokenizer.mask_token_id, end_id, tokenizer.eos_token_id)
    data = Data(tokenizer, model.config, *ids, args.seed, repairs=False)
    data.source = sources(args.task, args.seed)
    losses = []
    steps = watched(range(args.steps), "steps", args.steps)
    for step, batch in zip(steps, data.batches(args.tokens), strict=False):
        adam.param_groups[0]["lr"] = RATE * min(1.0, (step + 1) / 50, (args.steps - step) / args.steps / 0.4)
        at = batch.hidden(ids[0])
        out = model.hidden(batch.ids, batch.positions, batch.mask)[at]
        loss = F.cross_entropy(model.lm_head(out).float(), batch.answer[at])
        adam.zero_grad()
        loss.backward()
        adam.step()
        losses.append(loss.item())
        if step % 50 == 49:
            say(f"step {step + 1} loss {sum(losses[-50:]) / 50:.4f}")
    save(args.out, adapted, args.rank)


def save(folder: Path, adapted: dict[str, Adapted], rank: int) -> None:
    """Write an adapter as PEFT does, rounded to bf16."""
    folder.mkdir(parents=True, exist_ok=True)
    targets = sorted({path.rpartition(".")[2] for path in adapted})
    fields = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": targets, "bias": "none"}
    (folder / CONFIG_FILE).write_text(json.dumps(fields, indent=2) + "\n")
    halves = {"lora_A": "a", "lora_B": "b"}
    tensors = {
        f"{PREFIX}{path}.{half}.weight": getattr(layer, name).detach().bfloat16()
        for path, layer in adapted.items()
        for half, name in halves.items()
    }
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    main()
