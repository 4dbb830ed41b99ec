"""A file of questions to a file of answers: `python -m examples.batch examples/questions.jsonl answers.jsonl`.

Lines are those of OpenAI's batches: `custom_id`, `url` and `body` in, `custom_id` and `response` or `error` out, in the
same order. As many are under way at once as `--at-once` says; the server makes batches of them by itself. `make serve`
starts one.
"""

from __future__ import annotations

import argparse
import json
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any


def answer(server: str, line: str) -> dict[str, Any]:
    """What a server says to a line."""
    asked = json.loads(line)
    body = json.dumps({"model": "default", **asked["body"]}).encode()
    request = urllib.request.Request(server + asked["url"], body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request) as reply:
            said = {"response": {"status_code": reply.status, "body": json.load(reply)}, "error": None}
    except urllib.error.HTTPError as error:  # a refusal, in words
        said = {"response": None, "error": {"code": error.code, "message": json.load(error)["message"]}}
    return {"custom_id": asked["custom_id"], **said}


def main() -> None:
    """Answer every line, and say what became of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("questions", type=Path)
    parser.add_argument("answers", type=Path)
    parser.add_argument("--url", default="http://127.0.0.1:30000", help="the server's address, without /v1")
    parser.add_argument("--at-once", type=int, default=64)
    args = parser.parse_args()
    with ThreadPoolExecutor(args.at_once) as pool, args.answers.open("w") as out:
        for said in pool.map(partial(answer, args.url), args.questions.read_text().splitlines()):
            out.write(json.dumps(said) + "\n")
            error, body = said["error"], (said["response"] or {}).get("body")
            print(f"{said['custom_id']}: {error['message'] if error else body['choices'][0]['message']['content']}")


if __name__ == "__main__":
    main()
