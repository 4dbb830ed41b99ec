"""Two chat completions of a running server: `python -m examples.openai_client --url http://127.0.0.1:30000`.

The first answer comes whole, the second in pieces as its blocks are decided. `make serve` starts a server.
"""

from __future__ import annotations

import argparse

from openai import OpenAI
from openai.types.chat import ChatCompletionUserMessageParam

QUESTIONS = ("What is 17 + 25?", "List 12 numbers from 26.")


def user(text: str) -> list[ChatCompletionUserMessageParam]:
    """A conversation of one question."""
    return [{"role": "user", "content": text}]


def whole(client: OpenAI, model: str, question: str) -> None:
    """Ask and wait for the whole answer."""
    reply = client.chat.completions.create(model=model, messages=user(question), temperature=0, max_tokens=128)
    print(f"question: {question}\nanswer:   {reply.choices[0].message.content}")


def streamed(client: OpenAI, model: str, question: str) -> None:
    """Print each piece of the answer as it arrives, separated by bars."""
    print(f"question: {question}\npieces:   ", end="")
    stream = client.chat.completions.create(
        model=model, messages=user(question), temperature=0, max_tokens=128, stream=True
    )
    for chunk in stream:
        if chunk.choices and chunk.choices[0].delta.content:
            print(chunk.choices[0].delta.content, end="|", flush=True)
    print()


def main() -> None:
    """Ask the model that the server serves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:30000", help="the server's address, without /v1")
    args = parser.parse_args()
    client = OpenAI(base_url=args.url + "/v1", api_key="none")  # the client insists on a key
    model = client.models.list().data[0].id
    whole(client, model, QUESTIONS[0])
    streamed(client, model, QUESTIONS[1])


if __name__ == "__main__":
    main()
