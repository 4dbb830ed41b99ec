"""The reference: LLaDA2 in one file, without a cache, a batch scheduler or a kernel, and its 2.0 decode loop.

Everything that is served is compared with this file, so it is written to be read beside the reports: modules carry
the checkpoint's names (state_dict keys are checkpoint keys), the decode loop recomputes the whole sequence each step
and walks over positions in Python. It is not meant to be fast.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sglang_llada.llada2.config import Llada2Config
from sglang_llada.llada2.router import router_of


def block_causal_mask(length: int, block_size: int) -> Tensor:
    """bool [L, L], True where a query (row) may attend: to every position up to the end of its own block."""
    block = torch.arange(length) // block_size
    return block[:, None] >= block[None, :]


class RMSNorm(nn.Module):
    """x / rms(x) * weight, computed in fp32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return (y * self.weight.float()).to(x.dtype)


def rotate(x: Tensor, positions: Tensor, rotary_dim: int, theta: float) -> Tensor:
    """Rotary embedding (neox halves) of the first `rotary_dim` dimensions; x [B, L, heads, D], positions [B, L]."""
    exponent = torch.arange(0, rotary_dim, 2, dtype=torch.float32, device=x.device) / rotary_dim
    angle = positions[..., None, None].float() * theta**-exponent  # [B, L, 1, rotary_dim / 2]
    cos, sin = angle.cos(), angle.sin()
    a, b = x[..., :rotary_dim].float().chunk(2, dim=-1)
    turned = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)
    return torch.cat((turned, x[..., rotary_dim:]), dim=-1)


class Attention(nn.Module):
    """Grouped-query attention with per-head query and key norms and a mask that the caller chooses."""

    def __init__(self, c: Llada2Config) -> None:
        super().__init__()
        self.config = c
        self.query_key_value = nn.Linear(
            c.hidden_size, (c.num_attention_heads + 2 * c.num_key_value_heads) * c.head_dim, bias=False
        )
        self.query_layernorm = RMSNorm(c.head_dim, c.rms_norm_eps)
        self.key_layernorm = RMSNorm(c.head_dim, c.rms_norm_eps)
        self.dense = nn.Linear(c.num_attention_heads * c.head_dim, c.hidden_size, bias=False)

    def forward(self, x: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        c = self.config
        heads = self.query_key_value(x).unflatten(-1, (-1, c.head_dim))  # [B, L, heads, D]
        q, k, v = heads.split((c.num_attention_heads, c.num_key_value_heads, c.num_key_value_heads), dim=-2)
        q = rotate(self.query_layernorm(q), positions, c.rotary_dim, c.rope_theta)
        k = rotate(self.key_layernorm(k), positions, c.rotary_dim, c.rope_theta)
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask[:, None], enable_gqa=True
        )
        return self.dense(out.transpose(1, 2).flatten(-2))


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, width, bias=False)
        self.up_proj = nn.Linear(hidden, width, bias=False)
        self.down_proj = nn.Linear(width, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Llada2Router(nn.Module):
    """The fp32 gate; `forward` gives (weights, ids), both [N, K]."""

    expert_bias: Tensor

    def __init__(self, c: Llada2Config) -> None:
        super().__init__()
        self.config = c
        self.route = router_of(c)
        self.weight = nn.Parameter(torch.empty(c.num_experts, c.hidden_size, dtype=torch.float32).normal_(std=0.02))
        if c.moe_router_enable_expert_bias:
            self.register_buffer("expert_bias", torch.zeros(c.num_experts, dtype=torch.float32))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        c = self.config
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x.float(), self.weight.float())
        bias = self.expert_bias if c.moe_router_enable_expert_bias else logits.new_zeros(c.num_experts)
        routing = self.route(logits, bias)
        return routing.weights * c.routed_scaling_factor, routing.ids


class MoE(nn.Module):
    """Routed experts, one after the other, plus the shared ones."""

    def __init__(self, c: Llada2Config) -> None:
        super().__init__()
        self.gate = Llada2Router(c)
        self.experts = nn.ModuleList(MLP(c.hidden_size, c.moe_intermediate_size) for _ in range(c.num_experts))
        if c.num_shared_experts:
            self.shared_experts = MLP(c.hidden_size, c.shared_intermediate_size)
        self.has_shared = c.num_shared_experts > 0

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, -2)  # [N, H]
        weights, ids = self.gate(flat)
        out = self.shared_experts(flat) if self.has_shared else torch.zeros_like(flat)
        for e, expert in enumerate(self.experts):
            token, slot = (ids == e).nonzero(as_tuple=True)
            if token.numel():
                part = expert(flat[token]) * weights[token, slot, None].to(flat.dtype)
                out = out.index_add(0, token, part.to(out.dtype))
        return out.view_as(x)


class Layer(nn.Module):
    """Pre-norm attention, then pre-norm MLP or experts."""

    def __init__(self, c: Llada2Config, index: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.attention = Attention(c)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp: nn.Module = MLP(c.hidden_size, c.intermediate_size) if c.is_dense(index) else MoE(c)

    def forward(self, x: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        x = x + self.attention(self.input_layernorm(x), positions, mask)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class Trunk(nn.Module):
    """Embeddings, layers and the last norm."""

    def __init__(self, c: Llada2Config) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Layer(c, i) for i in range(c.num_hidden_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)


class Llada2ForDiffusion(nn.Module):
    """The network; the caller gives ids, positions and who may attend to whom."""

    def __init__(self, config: Llada2Config) -> None:
        super().__init__()
        self.config = config
        self.model = Trunk(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.word_embeddings.weight

    def hidden(self, ids: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        """Normed hidden states [B, L, H] of ids [B, L] at positions [B, L] under mask [B, L, L] (True = attend)."""
        x = self.model.word_embeddings(ids)
        for layer in self.model.layers:
            x = layer(x, positions, mask)
        out: Tensor = self.model.norm(x)
        return out

    def forward(self, ids: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        """Logits fp32 [B, L, V]."""
        out: Tensor = self.lm_head(self.hidden(ids, positions, mask)).float()
        return out

    @torch.no_grad()
    def block_causal(self, ids: list[int]) -> Tensor:
        """Logits fp32 [L, V] of one sequence under the block-causal mask."""
        row = torch.tensor([ids])
        mask = block_causal_mask(len(ids), self.config.block_size)[None]
        logits: Tensor = self(row, torch.arange(len(ids))[None], mask)[0]
        return logits


@dataclass(slots=True)
class Generation:
    """What the reference decode gives.

    `margins` has, per forward, the distance to the nearest decision that could have gone the other way (a tie for the
    best token or for the last place of the quota, or a confidence at the threshold), so that a comparison in floating
    point can set such cases apart.
    """

    token_ids: list[int]
    finish: str  # "stop" | "length"
    forwards: int
    # Of each token the step of its block (from 1) that decided it, and its probability then.
    notes: list[tuple[int, float]] = field(default_factory=list)
    margins: list[float] = field(default_factory=list)

    @property
    def step_map(self) -> list[int]:
        """1-based step of its block in which each token was decided."""
        return [step for step, _ in self.notes]


def quota(step: int, block_size: int, steps: int) -> int:
    """Positions that step `step` (from 0) must decide at least: an even split, the first steps taking the remainder."""
    return block_size // steps + (1 if step < block_size % steps else 0)


GIVEN = (0, 1.0)  # the note on a token that the request brings: no step decided it


def last_given(canvas: Sequence[int | None]) -> int:
    """Where the last given token of a canvas stands; 0 if there is none."""
    return max((i for i, token in enumerate(canvas) if token is not None), default=0)


@torch.no_grad()
def generate(
    model: Llada2ForDiffusion,
    prompt_ids: list[int],
    max_new_tokens: int,
    *,
    mask_id: int,
    stop_ids: Iterable[int] = (),
    threshold: float = 0.95,
    steps: int = 32,
    early_exit: bool = True,
    max_nfe: int = 0,
    canvas: Sequence[int | None] = (),
) -> Generation:
    """Threshold decode of LLaDA2.0, greedy, one block of `config.block_size` after the other.

    A step decides every open position whose best token has probability > threshold (strictly), and at least the
    quota's most confident ones (of equals the earliest position). The best token is never the mask; of equals it is
    the lowest id; its probability is over the full vocabulary. The answer is complete, and no further step is made,
    as soon as a stop token or the last allowed token has been decided with nothing open before it; without early_exit
    not before nothing of its block is open. After max_nfe steps (if not 0) it ends before the first open position.

    A canvas is an answer of which some tokens are given, None where open: given ones are fixed as a prompt's are, a
    block without an open one takes no step, and stop tokens count from the last given position on.
    """
    size, stops = model.config.block_size, frozenset(stop_ids)
    known, wanted = list(prompt_ids), [*prompt_ids, *canvas]
    limit, stops_from = len(prompt_ids) + max_new_tokens, last_given(canvas)
    out = Generation([], "length", 0)
    while len(known) < limit:
        start = len(known) // size * size
        first = len(known) - start  # positions of this block that are the prompt's
        stands = (wanted[start : start + size] + [None] * size)[:size]
        block = [mask_id if token is None else token for token in stands]
        is_open = [token is None for token in stands]
        notes = [GIVEN] * size
        end = None
        for step in range(steps):
            if not any(is_open):
                break
            logits = model.block_causal(known[:start] + block)[start:]
            out.forwards += 1
            probs = logits.softmax(-1)
            logits[:, mask_id] = float("-inf")
            best = [min(row.eq(row.max()).nonzero().flatten().tolist()) for row in logits]
            conf = [probs[i, best[i]].item() for i in range(size)]
            candidates = [i for i in range(size) if is_open[i]]
            least = min(quota(step, size, steps), len(candidates))
            order = sorted(candidates, key=lambda i: (-conf[i], i))
            sure = [i for i in candidates if conf[i] > threshold]
            chosen = sure if len(sure) >= least else order[:least]
            out.margins.append(_margin(logits, conf, candidates, chosen, order, threshold))
            for i in chosen:
                block[i], is_open[i], notes[i] = best[i], False, (step + 1, conf[i])
            end = _answer_end(block, is_open, first, limit - start, stops, len(prompt_ids) + stops_from - start)
            if (end is not None and early_exit) or out.forwards == max_nfe:
                break
        if _take(out, block[first:], is_open[first:], notes[first:], max_new_tokens, stops, stops_from):
            break
        known = list(prompt_ids) + out.token_ids
        if 0 < max_nfe == out.forwards:
            break
    return out


@torch.no_grad()
def read(
    model: Llada2ForDiffusion,
    prompt_ids: list[int],
    canvas: Sequence[int | None],
    choices: Sequence[int],
    *,
    mask_id: int,
) -> list[list[float]]:
    """Of each open position of a canvas the probabilities of some tokens, over the full vocabulary.

    From one forward, which decides nothing: all open positions are the mask, and so is what stands behind the canvas in
    its last block.
    """
    wanted = [*prompt_ids, *canvas]
    ids = [mask_id if token is None else token for token in wanted]
    ids += [mask_id] * (-len(ids) % model.config.block_size)
    probs = model.block_causal(ids).softmax(-1)
    return [[probs[i, choice].item() for choice in choices] for i, token in enumerate(wanted) if token is None]


def _take(
    out: Generation,
    tokens: list[int],
    is_open: list[bool],
    notes: list[tuple[int, float]],
    limit: int,
    stops: frozenset[int],
    stops_from: int,
) -> bool:
    """Add a block's tokens up to the first open one, to the first stop token or to the limit; whether it is stopped."""
    for token, is_hole, note in zip(tokens, is_open, notes, strict=True):
        if is_hole or len(out.token_ids) == limit:
            break
        out.token_ids.append(token)
        out.notes.append(note)
        if token in stops and len(out.token_ids) > stops_from:
            out.finish = "stop"
            return True
    return False


def _answer_end(
    block: list[int], is_open: list[bool], first: int, limit: int, stops: frozenset[int], stops_from: int
) -> int | None:
    """End (exclusive) of the answer within the block if it is complete: nothing open up to a stop or the limit."""
    for i in range(first, len(block)):
        if is_open[i]:
            return None
        if (block[i] in stops and i >= stops_from) or i + 1 == limit:
            return i + 1
    return None


def _margin(
    logits: Tensor, conf: list[float], candidates: list[int], chosen: list[int], order: list[int], threshold: float
) -> float:
    """Distance of the step's nearest close call; see Generation."""
    top = logits[chosen].topk(2, dim=-1).values
    gaps = (top[:, 0] - top[:, 1]).tolist()
    gaps += [abs(conf[i] - threshold) for i in candidates]
    if len(chosen) < len(order) and all(conf[i] <= threshold for i in order[len(chosen) :]):
        gaps.append(conf[order[len(chosen) - 1]] - conf[order[len(chosen)]])
    return min(gaps)
