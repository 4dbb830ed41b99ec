"""One block decoded step by step and printed, without SGLang: `python -m examples.decode_by_hand "Spell KLM."`.

The step contract (sglang_llada/decode/contract.py): the network scores a block's open positions, the algorithm decides
some of them, until nothing is open. `·` is an open position.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast

from sglang_llada.decode.contract import BlockRows, Params, Scores, State, Tokens
from sglang_llada.decode.select import best
from sglang_llada.decode.threshold import step
from sglang_llada.llada2.checkpoint import read_facts
from sglang_llada.llada2.reference import Llada2ForDiffusion
from sglang_llada.llada2.weights import load_reference

CHECKPOINT, OPEN = Path(__file__).parent / "tiny-llada2", "·"


def decode_block(
    model: Llada2ForDiffusion, tokenizer: PreTrainedTokenizerFast, prompt: list[int], mask_id: int, params: Params
) -> list[int]:
    """Decide and print the prompt's live block; gives the tokens after the prompt's end."""
    size = model.config.block_size
    start, given = len(prompt) // size * size, len(prompt) % size  # the live block begins with the prompt's last tokens
    ids = torch.tensor([prompt[start:] + [mask_id] * (size - given)])  # [1, T]
    nothing = torch.zeros(1, size, dtype=torch.bool)
    block = BlockRows(ids=ids, open=torch.arange(size)[None] >= given, editable=nothing)
    state = State(*torch.zeros(2, 1, dtype=torch.int64))
    while block.open.any():
        logits = model.block_causal(prompt[:start] + block.ids[0].tolist())[start:]  # [T, V]
        found = best(logits, mask_id)
        scores = Scores(token=found.token.T, prob=found.prob.T)  # [1, T]
        out = step(block, scores, state, params)
        decided = (block.open & ~out.open)[0].nonzero().flatten().tolist()
        block, state = BlockRows(ids=out.ids, open=out.open, editable=nothing), out.state
        print(f"step {state.step.item()}: {text(tokenizer, block, given)}")
        for i in decided:
            print(f"    {i:2} {tokenizer.decode([block.ids[0, i].item()])!r} {found.prob[i, 0]:.3f}")
    return block.ids[0, given:].tolist()


def text(tokenizer: PreTrainedTokenizerFast, block: BlockRows, given: int) -> str:
    """The block from position `given` on, with a visible character at open positions."""
    tokens = zip(block.ids[0, given:].tolist(), block.open[0, given:].tolist(), strict=True)
    return "".join(OPEN if is_open else tokenizer.decode([token]) for token, is_open in tokens)


def main() -> None:
    """Decode the block in which the answer to a question begins."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question", nargs="?", default="List 10 numbers from 33.")
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--threshold", type=float, default=0.95)
    args = parser.parse_args()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(args.checkpoint)
    facts, chat = read_facts(args.checkpoint), [{"role": "user", "content": args.question}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=False)
    params = Params(
        threshold=torch.tensor([args.threshold]),
        steps=torch.tensor([facts.block_size]),
        edit_threshold=torch.ones(1),
        max_post_edit_steps=torch.zeros(1, dtype=torch.int64),
        cumulative_budget=torch.zeros(1, dtype=torch.bool),
        tokens=Tokens(facts.mask_id),
    )
    tokens = decode_block(load_reference(args.checkpoint), tokenizer, prompt, facts.mask_id, params)
    end = next((i for i, token in enumerate(tokens) if token in facts.stop_ids), len(tokens))
    print("answer:", tokenizer.decode(tokens[:end]))


if __name__ == "__main__":
    main()
