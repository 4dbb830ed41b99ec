"""Stop expressions end the request that they are of, in time, and what they find is what Python's re finds."""

from __future__ import annotations

import random
import re
import time
from typing import Any

import pytest
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.sampling.sampling_params import MAX_LEN, SamplingParams, get_max_seq_length

from sglang_llada.host.requests import stops
from tests.host.serving import Server

pytestmark = pytest.mark.host

# Against a run of one letter each takes longer than anybody lives, and `re` cannot be stopped.
HOSTILE = ["(a|aa)+[^a]", "((a?){40})+[^a]", "(a|a)*[^a]"]
# These would be written out, and take all memory.
LARGE = [
    "((a{65535}){65535}){65535}",
    "((((a?){50}){50}){50}){50}",
    "(?:(?=a){60000}){60000}",
    "(?:(?:(a)|b){999}){99}",
]
PATTERNS = r"""
[0-9]{2} a{2,}b a{,3}b x{e} (?:ab){s<=1} \\{i} \{e} [{e}] ^b b$ \bab\b (?i)AB (?s)a.b (a)|b (ab)\1 (?<=a)b (?!a)b a*?b
{ a{ a{} a{x} (?m)^b$ [^a]b \d\s\w (?P<x>a)(?P=x)
""".split()


def test_expressions_mean_what_they_mean_to_python() -> None:
    rng = random.Random(0)
    texts = ["".join(rng.choices("ab{}ei1 \n\\x", k=rng.randint(0, 12))) for _ in range(3000)]
    for pattern in PATTERNS:
        for text in texts:
            want, got = re.search(pattern, text), stops.compiled(pattern).search(text)
            assert (want and want.span()) == (got and got.span()), (pattern, text)


@pytest.mark.parametrize(
    "pattern", ["a{99999999999999999999}", "(" * 3000 + ")" * 3000, "((", "[a", "(?P<a>b)(?P<a>c)"]
)
def test_what_cannot_be_read_is_said(pattern: str) -> None:
    with pytest.raises(ValueError, match="stop_regex is .*, which cannot be read: "):
        stops.read(lambda _: 1, pattern)


def test_a_longest_match_is_a_number_that_can_be_sent() -> None:
    pattern = "((((a{0,65535}){0,65535}){0,65535}){0,65535}){0,65535}"
    assert stops.read(get_max_seq_length, pattern) == stops.read(lambda _: 65535**5, pattern) == MAX_LEN


@pytest.mark.parametrize("pattern", HOSTILE)
def test_a_search_ends_in_time_and_ends_its_request(pattern: str) -> None:
    def check(req: Any, new: int) -> bool:
        return any(stops.SEARCH.search(pattern, "a" * 5000) for _ in range(new))

    req = Req("r", "", [1], SamplingParams())
    req.sampling_params.stop_regex_strs = [pattern]
    begin = time.monotonic()
    assert stops.within_time(check, req, 1000)
    assert time.monotonic() - begin < 10 * stops.SECONDS
    reason = req.finished_reason.to_json()
    assert reason["status_code"] == 400 and reason["message"].startswith(f"stop_regex is '{pattern}'"), reason


def test_hostile_expressions_end_their_requests_and_no_others(
    tmp_path_factory: pytest.TempPathFactory, server: Server
) -> None:
    """The model is held to a run of one letter, on which each of them would hang."""
    plain = {"text": "What is 17 + 25?", "sampling_params": {"temperature": 0, "max_new_tokens": 40}}
    want = server.post("/generate", plain).json()["output_ids"]
    for pattern in HOSTILE:
        held = {"max_new_tokens": 64, "regex": "a{60,}", "temperature": 0, "stop_regex": [pattern]}
        begin = time.monotonic()
        reply = server.post("/generate", {"text": "a", "sampling_params": held})
        assert time.monotonic() - begin < 20
        assert reply.status_code == 400 and "stop_regex is" in reply.text, (pattern, reply.text)
        assert server.post("/generate", plain).json()["output_ids"] == want
    server.flush()
