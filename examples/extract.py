"""Facts out of sentences, by a schema: `python -m examples.extract --url http://127.0.0.1:30000`.

The server's grammar lets nothing else be written than JSON of this form, so that what comes can be read without a look.
`make serve` starts a server.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from typing import Any

from openai import OpenAI

SENTENCES = ("Mia is 31 and lives in Oslo", "Paul from Rome is 58 years old", "Ida is 19 and lives in Lima")
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "city": {"type": "string"},
    },
    "required": ["name", "age", "city"],
    "additionalProperties": False,
}


@dataclass(frozen=True, slots=True)
class Person:
    """What a sentence says."""

    name: str
    age: int
    city: str


def main() -> None:
    """Ask the model that the server serves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:30000", help="the server's address, without /v1")
    args = parser.parse_args()
    client = OpenAI(base_url=args.url + "/v1", api_key="none")  # the client insists on a key
    model = client.models.list().data[0].id
    for sentence in SENTENCES:
        reply = client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": f"Make JSON: {sentence}."}],
            temperature=0,
            max_tokens=128,
            response_format={
                "type": "json_schema",
                "json_schema": {"name": "person", "schema": SCHEMA, "strict": True},
            },
        )
        print(Person(**json.loads(reply.choices[0].message.content or "")))


if __name__ == "__main__":
    main()
