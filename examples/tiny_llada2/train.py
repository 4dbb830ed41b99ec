"""Train the tiny checkpoints, each kind from the one before:

    python -m examples.tiny_llada2.train --minutes 65 --out tiny-llada2
    python -m examples.tiny_llada2.train --minutes 42 --kind 2.1 --resume tiny-llada2 --out tiny-llada2.1
    python -m examples.tiny_llada2.train --minutes 50 --kind 2.2 --resume tiny-llada2 --out tiny-llada2.2

Block diffusion: a sequence holds the conversation's clean blocks, then noised copies of the blocks that the answer
touches. A noised block sees itself and the clean blocks before it; a clean block sees itself and those before it. Only
answer positions are masked, at one ratio per block, and only they carry loss. The answer is followed by the end of its
turn, and its last block is filled with the end-of-text token.

Kind 2.1 also learns to repair: every other step some masks hold the network's own guesses, some visible tokens are
wrong, and all answer positions carry loss. Kind 2.2 also learns to insert and delete: in those steps spurious tokens
stand in the block, whose label is DELETE, and tokens are missing, for which the next one's label is SPLIT; it routes by
blocks.

Hidden matrices are updated by orthogonalised momentum (Muon), the rest by AdamW; experts are balanced by nudging the
router's bias. The learning rate follows the clock, so that a run ends when it is told to.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedTokenizerFast

from examples.tiny_llada2 import tokenizer as tokenizers
from examples.tiny_llada2.tasks import Example, examples
from sglang_llada.llada2 import reference
from sglang_llada.llada2.config import Llada2Config
from sglang_llada.llada2.reference import Llada2ForDiffusion, MoE
from sglang_llada.llada2.weights import load_reference

FUSED = SDPBackend.FLASH_ATTENTION
COPIES = 2  # noised copies of an answer per clean context
MUON_RATE, ADAM_RATE = 6e-3, 3e-3
BIAS_RATE = 1e-3
REPLACED = 0.05  # of visible answer tokens, where the network learns to repair
SHIFTED = 0.04  # of answer positions: spurious, and as many missing, where the network learns to delete and insert
EDIT_TOKENS = ["<|delete|>", "<|split|>"]
KINDS = ("2.0", "2.1", "2.2")


@dataclass(frozen=True, slots=True)
class Sample:
    """Token ids of whole blocks, and which of them belong to the answer."""

    ids: list[int]
    answer_from: int


@dataclass(frozen=True, slots=True)
class Batch:
    """ids, positions int64 [B, L]; mask bool [B, L, L]; answer int64 [B, L], -100 outside of noised answers.

    repair: whether to fill in wrong tokens too, and to learn from all of the answer.
    """

    ids: Tensor
    positions: Tensor
    mask: Tensor
    answer: Tensor
    repair: bool

    def hidden(self, mask_id: int) -> Tensor:
        """Masked positions, bool [B, L]; these alone carry loss unless tokens are to be repaired."""
        return (self.answer != -100) & (self.ids == mask_id)


class FusedExperts(nn.Module):
    """The reference's MoE with one weight per matrix of all experts; same result, fast enough to train."""

    def __init__(self, moe: MoE) -> None:
        super().__init__()
        self.gate, self.shared_experts = moe.gate, moe.shared_experts
        stack = lambda name: nn.Parameter(torch.stack([getattr(e, name).weight.detach() for e in moe.experts]))  # noqa: E731
        self.gate_proj, self.up_proj, self.down_proj = stack("gate_proj"), stack("up_proj"), stack("down_proj")
        self.load = torch.zeros(len(moe.experts))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, -2)
        weights, ids = self.gate(flat)
        experts = self.gate_proj.shape[0]
        order = ids.flatten().argsort()
        counts = ids.flatten().bincount(minlength=experts)
        self.load += counts
        token = order // ids.shape[-1]
        parts = flat[token].split(counts.tolist())
        outs = []
        for e, part in enumerate(parts):
            inner = F.silu(F.linear(part, self.gate_proj[e])) * F.linear(part, self.up_proj[e])
            outs.append(F.linear(inner, self.down_proj[e]))
        routed = torch.cat(outs) * weights.flatten()[order, None].to(x.dtype)
        shared = self.shared_experts(flat)
        return shared.index_add(0, token, routed.to(shared.dtype)).view_as(x)

    @torch.no_grad()
    def balance(self) -> None:
        """Make crowded experts less likely to be chosen."""
        self.gate.expert_bias += BIAS_RATE * (self.load.mean() - self.load).sign()
        self.load.zero_()


class Muon:
    """Momentum whose update is made orthogonal by a Newton-Schulz iteration; matrices [..., m, n]."""

    def __init__(self, params: list[nn.Parameter], momentum: float = 0.95) -> None:
        self.params, self.momentum = params, momentum
        self.buffers = [torch.zeros_like(p) for p in params]

    @torch.no_grad()
    def step(self, rate: float) -> None:
        for p, buffer in zip(self.params, self.buffers, strict=True):
            assert p.grad is not None
            buffer.lerp_(p.grad, 1 - self.momentum)
            update = orthogonal(p.grad.lerp(buffer, self.momentum))
            p.mul_(1 - rate * 0.02).add_(update, alpha=-rate * math.sqrt(max(1, p.shape[-2] / p.shape[-1])) * 1.5)
            p.grad = None


def orthogonal(g: Tensor) -> Tensor:
    """Nearest (nearly) orthogonal matrix, by five Newton-Schulz steps (coefficients of K. Jordan's Muon)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        s = x @ x.mT
        x = a * x + (b * s + c * s @ s) @ x
    return (x.mT if tall else x).float()


class Data:
    """Batches of about `tokens` positions, conversations of similar length together."""

    def __init__(
        self,
        tokenizer: object,
        config: Llada2Config,
        mask_id: int,
        end_id: int,
        fill_id: int,
        seed: int,
        *,
        repairs: bool,
    ) -> None:
        self.tokenizer, self.size = tokenizer, config.block_size
        self.mask_id, self.end_id, self.fill_id = mask_id, end_id, fill_id
        self.source, self.rng = examples(seed, held_out=False, hard=repairs), random.Random(seed)
        self.noise = torch.Generator().manual_seed(seed)
        self.repairs, self.edit_ids = repairs, edit_ids_of(config)

    def sample(self, example: Example) -> Sample:
        """The conversation as whole blocks."""
        prompt = self.tokenizer.apply_chat_template(  # type: ignore[attr-defined]
            example.messages, add_generation_prompt=True, tokenize=True, return_dict=False
        )
        ids = prompt + self.tokenizer.encode(example.answer) + [self.end_id]  # type: ignore[attr-defined]
        return Sample(ids + [self.fill_id] * (-len(ids) % self.size), len(prompt))

    def batches(self, tokens: int) -> Iterator[Batch]:
        """Endless batches."""
        while True:
            pool = sorted((self.sample(next(self.source)) for _ in range(1024)), key=self._length)
            groups: list[list[Sample]] = [[]]
            for sample in pool:
                if self._length(sample) * (len(groups[-1]) + 1) > tokens and groups[-1]:
                    groups.append([])
                groups[-1].append(sample)
            self.rng.shuffle(groups)
            for i, group in enumerate(groups):
                yield self.batch(group, repair=self.repairs and i % 2 == 1)

    def _length(self, sample: Sample) -> int:
        first = sample.answer_from // self.size * self.size
        return len(sample.ids) - self.size + COPIES * (len(sample.ids) - first)

    def batch(self, samples: list[Sample], *, repair: bool) -> Batch:
        """Clean blocks (but the last, which nobody sees) and noised copies, padded to the longest."""
        width = max(map(self._length, samples))
        ids = torch.full((len(samples), width), self.fill_id)
        positions = torch.zeros_like(ids)
        answer = torch.full_like(ids, -100)
        copy = torch.full_like(ids, -1)  # 0 clean, 1.. noised, -1 padding
        for b, sample in enumerate(samples):
            tokens = torch.tensor(sample.ids)
            clean, first = len(tokens) - self.size, sample.answer_from // self.size * self.size
            ids[b, :clean], positions[b, :clean], copy[b, :clean] = tokens[:clean], torch.arange(clean), 0
            for c in range(COPIES):
                at = slice(clean + c * (len(tokens) - first), clean + (c + 1) * (len(tokens) - first))
                noised, wanted = self._noise(
                    tokens[first:], sample.answer_from - first, shifted=repair and bool(self.edit_ids)
                )
                ids[b, at], answer[b, at], copy[b, at] = noised, wanted, c + 1
                positions[b, at] = torch.arange(first, len(tokens))
        block = positions // self.size
        q, k, qc, kc = block[:, :, None], block[:, None, :], copy[:, :, None], copy[:, None, :]
        mask = ((kc == 0) & (k < q)) | ((kc == qc) & (k == q))
        return Batch(ids, positions, mask, answer, repair)

    def _noise(self, tokens: Tensor, given: int, *, shifted: bool) -> tuple[Tensor, Tensor]:
        blocks = len(tokens) // self.size
        # More often nearly everything than nearly nothing: answers are short, and decoding starts from all masks.
        ratio = torch.rand(blocks, generator=self.noise).sqrt().clamp(min=0.05).repeat_interleave(self.size)
        hidden = torch.rand(len(tokens), generator=self.noise) < ratio
        hidden[:given] = False
        noised, wanted = tokens.masked_fill(hidden, self.mask_id), tokens.clone()
        if shifted:
            pairs = [pair for at in range(0, len(tokens), self.size) for pair in self._shift(tokens, noised, at, given)]
            noised, wanted = torch.tensor(pairs).unbind(-1)
        wanted[:given] = -100
        return noised, wanted

    def _shift(self, tokens: Tensor, noised: Tensor, start: int, given: int) -> list[tuple[int, int]]:
        """The noised block at `start` with spurious and missing tokens, as (token, label); what follows moves up."""
        delete, split = self.edit_ids
        true, seen = tokens.tolist(), noised.tolist()
        out: list[tuple[int, int]] = []
        at = start
        while len(out) < self.size:
            if at >= len(true):
                out.append((self.fill_id, self.fill_id))
                continue
            draw = self.rng.random() if at >= given else 1.0
            follows = at + 1 < len(true) and seen[at + 1] != self.mask_id
            if draw < SHIFTED and seen[at] != self.mask_id:
                spurious = self.rng.choice((self.mask_id, self.rng.choice(true)))
                if spurious != true[at]:
                    out.append((spurious, delete))
                    continue
            if SHIFTED <= draw < 2 * SHIFTED and follows and true[at] not in (self.fill_id, true[at + 1]):
                out.append((seen[at + 1], split))
                at += 2
                continue
            out.append((seen[at], true[at]))
            at += 1
        return out


def edit_ids_of(config: Llada2Config) -> list[int]:
    """DELETE and SPLIT, or nothing where the checkpoint has none."""
    return [i for i in (config.delete_token_id, config.split_token_id) if i is not None]


@torch.no_grad()
def corrupted(model: Llada2ForDiffusion, batch: Batch, mask_id: int, generator: torch.Generator) -> Batch:
    """The batch as a rash decode leaves it: of each row a share of the masks holds the network's own guesses, and a few
    visible tokens are other answers' tokens."""
    hidden = batch.hidden(mask_id)
    logits = model.lm_head(model.hidden(batch.ids, batch.positions, batch.mask)[hidden]).float()
    logits[:, [mask_id, *edit_ids_of(model.config)]] = float("-inf")
    guesses = batch.ids.masked_scatter(hidden, logits.softmax(-1).multinomial(1, generator=generator).flatten())
    draw, share = torch.rand(2, *batch.ids.shape, generator=generator)
    filled = hidden & (draw < share[:, :1])
    answers = batch.ids[(batch.answer != -100) & ~hidden]
    others = answers[torch.randint(len(answers), batch.ids.shape, generator=generator)]
    replaced = (batch.answer != -100) & ~hidden & (draw < REPLACED)
    ids = torch.where(filled, guesses, torch.where(replaced, others, batch.ids))
    return replace(batch, ids=ids)


def make_config(vocab: int, mask_id: int, end_id: int, fill_id: int) -> Llada2Config:
    """The published fields, made small."""
    return Llada2Config(
        architectures=["LLaDA2MoeModelLM"],
        vocab_size=vocab,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=16,
        num_experts_per_tok=4,
        num_shared_experts=1,
        n_group=4,
        topk_group=2,
        moe_intermediate_size=128,
        first_k_dense_replace=1,
        rope_theta=10000.0,
        dtype="float32",
        mask_token_id=mask_id,
        eos_token_id=fill_id,
        pad_token_id=fill_id,
    )


def fuse(model: Llada2ForDiffusion) -> list[FusedExperts]:
    """Put FusedExperts where the network has experts, and name them."""
    for layer in model.model.layers:
        if isinstance(layer.mlp, MoE):
            layer.mlp = FusedExperts(layer.mlp)
    return [m for m in model.modules() if isinstance(m, FusedExperts)]


def checkpoint_tensors(model: Llada2ForDiffusion, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """Weights of a fused network under the checkpoint's names, rounded to a type (the router's stay fp32)."""
    out: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if ".mlp." in name and tensor.dim() == 3:
            prefix, matrix = name.rsplit(".", 1)
            for e, part in enumerate(tensor):
                out[f"{prefix}.experts.{e}.{matrix}.weight"] = part.to(dtype).contiguous()
        else:
            out[name] = tensor.clone() if ".mlp.gate." in name else tensor.to(dtype)
    return out


def save(model: Llada2ForDiffusion, path: Path, end_id: int, fill_id: int) -> None:
    """Write config, weights and generation config; the weights file is replaced at once."""
    model.config.save_pretrained(path)
    save_file(checkpoint_tensors(model), path / "model.safetensors.new", metadata={"format": "pt"})
    (path / "model.safetensors.new").replace(path / "model.safetensors")
    (path / "generation_config.json").write_text(
        f'{{\n  "eos_token_id": [{end_id}, {fill_id}],\n  "pad_token_id": {fill_id},\n  "temperature": 0.0\n}}\n'
    )


def initialise(model: nn.Module) -> None:
    """Small normal weights; the output of each residual branch smaller still."""
    for name, p in model.named_parameters():
        if p.dim() >= 2:
            nn.init.normal_(p, std=0.02 if "embed" in name or "head" in name else 0.6 / math.sqrt(p.shape[-1]))
            if name.endswith(("dense.weight", "down_proj.weight", "down_proj")):
                p.data.mul_(0.3)


def widen(model: Llada2ForDiffusion, old: Llada2ForDiffusion) -> None:
    """Take over another checkpoint's weights; tokens that it does not know keep their first values."""
    mine = model.state_dict()
    with torch.no_grad():
        for name, tensor in old.state_dict().items():
            mine[name][: len(tensor)] = tensor


def compile_elementwise() -> None:
    """Fuse the reference's norm and rotary arithmetic, which is a third of a step when run operation by operation."""
    reference.RMSNorm.forward = torch.compile(reference.RMSNorm.forward, dynamic=True)  # type: ignore[method-assign]
    reference.rotate = torch.compile(reference.rotate, dynamic=True)


def main() -> None:
    """Train until the time is up."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=65)
    parser.add_argument("--out", type=Path, default=Path("examples/tiny-llada2"))
    parser.add_argument("--tokens", type=int, default=6144, help="positions of a batch")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", type=Path, help="a checkpoint to go on from, with a fresh optimiser and a new seed")
    parser.add_argument(
        "--kind", choices=KINDS, default="2.0", help="2.1 learns to repair, 2.2 to insert and delete too"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    compile_elementwise()
    args.out.mkdir(parents=True, exist_ok=True)

    if args.resume:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(args.resume)
        tokenizer.save_pretrained(args.out)
    else:
        tokenizer = tokenizers.save(args.out)
    if args.kind == "2.2":
        tokenizer.add_special_tokens({"additional_special_tokens": EDIT_TOKENS})
        tokenizer.chat_template = tokenizers.TEMPLATES["2.2"]
        tokenizer.save_pretrained(args.out)
    mask_id, fill_id = tokenizer.mask_token_id, tokenizer.eos_token_id
    end_id = tokenizer.convert_tokens_to_ids("<|role_end|>")
    config = make_config(len(tokenizer), mask_id, end_id, fill_id)
    if args.kind == "2.2":
        config.delete_token_id, config.split_token_id = tokenizer.convert_tokens_to_ids(EDIT_TOKENS)
        config.expert_capacity = 8
    model = Llada2ForDiffusion(config)
    initialise(model)
    if args.resume:
        widen(model, load_reference(args.resume))
    fused = fuse(model)
    named = dict(model.named_parameters())
    hidden = [
        p for n, p in named.items() if p.dim() >= 2 and "embed" not in n and "head" not in n and "mlp.gate.w" not in n
    ]
    others = [p for p in named.values() if all(p is not h for h in hidden)]
    muon, adam = Muon(hidden), torch.optim.AdamW(others, lr=ADAM_RATE, betas=(0.9, 0.95), weight_decay=0.0)

    data = Data(tokenizer, config, mask_id, end_id, fill_id, args.seed, repairs=args.kind != "2.0")
    batches = data.batches(args.tokens)
    noise = torch.Generator().manual_seed(args.seed)
    begin, seen, losses, mark = time.time(), 0, [], time.time()
    step = 0
    while (done := (time.time() - begin) / (60 * args.minutes)) < 1:
        rate = min(1.0, (step + 1) / 100) * min(1.0, (1 - done) / 0.4)
        batch = next(batches)
        short = batch.ids.shape[1] <= 160  # where plain matrix products beat the fused attention kernel
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH if short else FUSED):
            if batch.repair:
                batch = corrupted(model, batch, mask_id, noise)
            at = batch.answer != -100 if batch.repair else batch.hidden(mask_id)
            out = model.hidden(batch.ids, batch.positions, batch.mask)[at]
            loss = F.cross_entropy(model.lm_head(out).float(), batch.answer[at])
            loss.backward()
        muon.step(MUON_RATE * rate)
        adam.param_groups[0]["lr"] = ADAM_RATE * rate
        adam.step()
        adam.zero_grad()
        for moe in fused:
            moe.balance()
        losses.append(loss.item())
        seen += batch.ids.numel()
        step += 1
        if step % 50 == 0:
            speed = seen / (time.time() - mark)
            print(f"step {step} {done:.0%} loss {sum(losses) / len(losses):.4f} {speed:.0f} tokens/s", flush=True)
            losses, seen, mark = [], 0, time.time()
        if step % 500 == 0:
            save(model, args.out, end_id, fill_id)
    save(model, args.out, end_id, fill_id)


if __name__ == "__main__":
    main()
