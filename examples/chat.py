"""A chat in a terminal: `python -m examples.chat --url http://127.0.0.1:30000`; `make serve` starts a server.

A question on each line. Tokens appear where and when they are decided; `·` is open, `▪` a special token. Where the
output is no terminal, each step has a line.
"""

from __future__ import annotations

import argparse
import shutil
import sys

from sglang_llada.service import Service
from sglang_llada.view.ask import Question, put

TERMINAL = sys.stdout.isatty()


def watch(service: Service, question: Question) -> str:
    """Ask, show every step, and give the answer."""
    cells: list[dict[str, int]] = []
    texts: dict[str, str] = {}
    answer = ""
    for event in put(service, question):
        texts |= {token: "▪" if text.startswith("<|") else text for token, text in event.get("texts", {}).items()}
        for frame in event.get("frames", ()):
            cells = [*cells[: frame["first"]], *frame["cells"]]
            if frame["step"]:
                show(frame["step"], "".join(texts[str(cell["token"])] if "token" in cell else "·" for cell in cells))
        answer = event.get("answer", answer)
    print(f"\r\x1b[K{answer}" if TERMINAL else answer)
    return answer


def show(step: int, text: str) -> None:
    """What stands after a step, over what stood before."""
    line, wide = text.replace("\n", "↵"), shutil.get_terminal_size().columns - 1
    print(f"\r\x1b[K{line[:wide]}" if TERMINAL else f"{step:3} {line}\n", end="", flush=True)


def main() -> None:
    """Until the end of the input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:30000", help="the server's address, without a path")
    parser.add_argument("--threshold", type=float, help="1: one token a step")
    args, messages = parser.parse_args(), list[dict[str, str]]()
    params = {"threshold": args.threshold} if args.threshold else {}
    print("> ", end="", flush=True)
    for line in sys.stdin:
        if not TERMINAL:
            print(line.strip())  # as a terminal does
        messages.append({"role": "user", "content": line.strip()})
        messages.append({"role": "assistant", "content": watch(Service(args.url), Question(messages, params))})
        print("> ", end="", flush=True)
    print()


if __name__ == "__main__":
    main()
