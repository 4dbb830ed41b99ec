"""One address for several servers: `python -m examples.router http://127.0.0.1:30001 http://127.0.0.1:30002`.

Starts SGLang's router (`pip install sglang-router`; `--python` names the Python that has it) in front of servers that
run already, puts questions to it, and ends it. `make serve PORT=30001` starts a server.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from functools import partial

COUNT = 16


def ask(router: str, number: int) -> str:
    """The answer to a question, through the router; it refuses with 503 until it knows its servers."""
    messages = [{"role": "user", "content": f"What is {number} + 25?"}]
    body = json.dumps({"model": "default", "messages": messages, "temperature": 0}).encode()
    request = urllib.request.Request(f"{router}/v1/chat/completions", body, {"Content-Type": "application/json"})
    for _ in range(100):
        try:
            with urllib.request.urlopen(request, timeout=60) as reply:
                return str(json.load(reply)["choices"][0]["message"]["content"])
        except urllib.error.URLError:
            time.sleep(0.2)
    raise TimeoutError("the router did not answer within 20 seconds")


def main() -> None:
    """Start, ask, end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("servers", nargs="+")
    parser.add_argument("--port", default="30000", help="the router's")
    parser.add_argument("--python", default=sys.executable)
    args = parser.parse_args()
    flags = ["--port", args.port, "--policy", "round_robin", "--log-level", "error"]
    command = [args.python, "-m", "sglang_router.launch_router", "--worker-urls", *args.servers, *flags]
    put = partial(ask, f"http://127.0.0.1:{args.port}")
    router = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        print(f"17 + 25 = {put(17)}")
        with ThreadPoolExecutor(COUNT) as pool:
            right = sum(answer == str(number + 25) for number, answer in enumerate(pool.map(put, range(COUNT))))
        print(f"{right} of {COUNT} answers are right")
    finally:
        router.terminate()
        router.wait()


if __name__ == "__main__":
    main()
