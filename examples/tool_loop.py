"""A model that calls a function: `python -m examples.tool_loop --url http://127.0.0.1:30000`.

The first turn must call a function, whose result the second one answers with. `make serve` starts a server; the parser
of calls follows from the checkpoint's chat template.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from openai import OpenAI

QUESTION = "What is 17 + 25?"
NUMBER = {"type": "integer", "minimum": 0, "maximum": 99}
TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Adds two numbers.",
            "strict": True,
            "parameters": {
                "type": "object",
                "properties": {"a": NUMBER, "b": NUMBER},
                "required": ["a", "b"],
                "additionalProperties": False,
            },
        },
    }
]
FUNCTIONS = {"add": lambda a, b: a + b}


def main() -> None:
    """Ask the model that the server serves, run what it calls, ask again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:30000", help="the server's address, without /v1")
    args = parser.parse_args()
    client = OpenAI(base_url=args.url + "/v1", api_key="none")  # the client insists on a key
    model = client.models.list().data[0].id
    messages: list[Any] = [{"role": "user", "content": QUESTION}]
    print(f"question: {QUESTION}")
    for choice in ("required", "none"):
        turn = client.chat.completions.create(
            model=model, messages=messages, tools=TOOLS, tool_choice=choice, max_tokens=128, temperature=0
        )
        message = turn.choices[0].message
        messages.append(message)
        for call in message.tool_calls or []:
            result = FUNCTIONS[call.function.name](**json.loads(call.function.arguments))
            print(f"call:     {call.function.name}({call.function.arguments}) = {result}")
            messages.append({"role": "tool", "tool_call_id": call.id, "content": json.dumps(result)})
    print(f"answer:   {message.content}")


if __name__ == "__main__":
    main()
