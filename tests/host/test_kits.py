"""The host's own server tests, as its wheel brings them, against the plain host command.

The checkpoint that ships here knows eight tasks and nothing of the world: it answers other questions with nothing, and
closes no string that nothing else bounds. What asks for more is named in BEYOND it and must fail, on whatever server.
"""

from __future__ import annotations

import json
import unittest
from collections.abc import Iterator
from typing import Any, TypeVar

import openai
import pytest
import requests
from sglang.test.kits.abort_timeout_kit import AbortAllMixin, RunningTimeoutTwoWaveMixin, WaitingTimeoutMixin
from sglang.test.kits.anthropic_messages_kit import AnthropicMessagesMixin
from sglang.test.kits.basic_api_contract_kit import BasicAPIContractMixin
from sglang.test.kits.basic_decode_correctness_kit import BasicDecodeCorrectnessMixin
from sglang.test.kits.basic_scheduler_stress_kit import BasicSchedulerStressMixin
from sglang.test.kits.ebnf_constrained_kit import EBNFConstrainedMixin
from sglang.test.kits.json_constrained_kit import JSONConstrainedMixin
from sglang.test.kits.json_mode_kit import JSONModeMixin
from sglang.test.kits.matched_stop_kit import MatchedStopMixin
from sglang.test.kits.pause_generation_kit import PauseResumeInPlaceMixin
from sglang.test.kits.regex_constrained_kit import RegexConstrainedMixin

from tests.host.conftest import TINY
from tests.host.serving import Server, serving

pytestmark = [pytest.mark.host, pytest.mark.timeout(200)]

BEYOND = {
    "test_basic_math": "391",
    "test_capital_france": "Paris",
    "test_color_completion": "yellow",
    "test_concurrent_requests": "capitals",
    "test_streaming_response": "Paris",
    "test_openai_completion": "any word about France",
    "test_max_token_one": "any word about France",
    "test_finish_length": "five words of a story",
    "test_finish_stop_str": "a line of a story",
    "test_finish_stop_regex_str": "an 'and' of a story",
    "test_finish_stop_eos": "the end token of Llama or Qwen",
    "test_json_mode_response": "the end of a string",
    "test_json_mode_with_streaming": "the end of a string",
    "test_regex_generate_complex_json": "the end of a string",
    "test_ebnf_generate_complex_json": "the end of a string",
}
Case = TypeVar("Case", bound=type[unittest.TestCase])


def within_reach(case: Case) -> Case:
    """The case with the tests of BEYOND expected to fail."""
    for name in BEYOND.keys() & set(dir(case)):
        setattr(case, name, unittest.expectedFailure(getattr(case, name)))
    return case


class Kit(unittest.TestCase):
    """What the host's kits want of a test case."""

    model, api_key = str(TINY), "none"
    base_url: str
    process: Any
    client: openai.OpenAI

    @pytest.fixture(autouse=True)
    def _server(self, server: Server) -> None:
        self.take(server)

    @classmethod
    def take(cls, server: Server) -> None:
        cls.base_url, cls.process = server.url, server.process
        cls.client = openai.OpenAI(base_url=server.url + "/v1", api_key="none")


@within_reach
class TestContract(BasicAPIContractMixin, Kit):
    pass


@within_reach
class TestDecode(BasicDecodeCorrectnessMixin, Kit):
    pass


@within_reach
class TestStress(BasicSchedulerStressMixin, Kit):
    test_long_prompt = unittest.skip("30,000 tokens here, before it asks for a word about France")(
        BasicSchedulerStressMixin.test_long_prompt
    )


@within_reach
class TestStops(MatchedStopMixin, Kit):
    pass


@within_reach
class TestRegex(RegexConstrainedMixin, Kit):
    pass


class TestJson(JSONConstrainedMixin, Kit):
    # The kit's own has no bounds.
    json_schema = json.dumps(
        {
            "type": "object",
            "properties": {
                "name": {"type": "string", "pattern": "^[\\w]{1,20}$"},
                "population": {"type": "integer", "minimum": 0, "maximum": 100_000_000},
            },
            "required": ["name", "population"],
            "additionalProperties": False,
        }
    )


@within_reach
class TestJsonMode(JSONModeMixin, Kit):
    pass


@within_reach
class TestEbnf(EBNFConstrainedMixin, Kit):
    pass


class TestAnthropic(AnthropicMessagesMixin, Kit):
    pass


class TestAborts(AbortAllMixin, Kit):
    pass


# --- a server that waits for nobody, and where no answer ends by itself -----------------------------------------------

RUNNING, SPECIAL = 4, 8  # requests at once; the first token ids, which end answers or are no text


@pytest.fixture(scope="module")
def impatient(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    bias = {str(token): -100 for token in [*range(SPECIAL), *range(396, 400)]}
    # A token a step, so that how long an answer takes hangs on the machine alone.
    preferred = json.dumps({"logit_bias": bias, "custom_params": {"threshold": 1.0}})
    flags = ["--max-running-requests", str(RUNNING), "--preferred-sampling-params", preferred]
    env = {"SGLANG_REQ_WAITING_TIMEOUT": "0.5", "SGLANG_REQ_RUNNING_TIMEOUT": "12"}
    with serving(TINY, tmp_path_factory.mktemp("impatient") / "log", *flags, env=env) as running:
        yield running


class ImpatientKit(Kit):
    @pytest.fixture(autouse=True)
    def _server(self, impatient: Server) -> None:
        self.take(impatient)


class TestPauses(PauseResumeInPlaceMixin, ImpatientKit):
    pause_num_requests, pause_max_new_tokens, pause_duration = RUNNING, 150, 2.0

    def tearDown(self) -> None:
        requests.post(self.base_url + "/continue_generation", json={}, timeout=20)


class TestWaiting(WaitingTimeoutMixin, ImpatientKit):
    # What runs must take longer than one may wait and not as long as one may run, however busy the machine is.
    waiting_timeout_num_requests, waiting_timeout_max_new_tokens = RUNNING + 1, 200


class TestRunning(RunningTimeoutTwoWaveMixin, ImpatientKit):
    running_timeout_num_wave1 = running_timeout_num_wave2 = RUNNING // 2
    running_timeout_max_new_tokens, running_timeout_sleep = 30_000, 1.0
