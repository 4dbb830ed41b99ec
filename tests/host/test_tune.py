"""Tuning before a real server: its figures are those of the same requests sent one by one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sglang_llada.__main__ import main
from tests.host.conftest import held_out_questions
from tests.host.serving import Server

pytestmark = [pytest.mark.host, pytest.mark.slow]


def test_figures_are_those_of_the_requests(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    questions, settings = held_out_questions(8), [{"threshold": 1}, {"threshold": 0.1, "live_blocks": 2}]
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(json.dumps({"messages": chat, "answer": answer}) for chat, answer in questions))
    chosen = [argument for setting in settings for argument in ("--setting", json.dumps(setting))]
    assert main(["tune", "--url", server.url, "--prompts", str(path), *chosen, "--at-once", "1", "8", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    found = {(row["at_once"], json.dumps(row["setting"])): row for row in record["rows"]}
    careful: list[list[int]] = []
    for setting in settings:
        answers = [
            server.generate(server.post("/tokenize", {"messages": chat}).json()["tokens"], 128, custom_params=setting)
            for chat, _ in questions
        ]
        ids = [answer["output_ids"] for answer in answers]
        careful = careful or ids
        for at_once in (1, 8):
            row = found[at_once, json.dumps(setting)]
            assert row["right"] == sum(a["text"] == b for a, (_, b) in zip(answers, questions, strict=True)) / 8
            assert row["same"] == sum(a == b for a, b in zip(ids, careful, strict=True)) / 8
            forwards = sum(answer["meta_info"]["dllm_nfe"] for answer in answers)
            assert row["tokens_per_forward"] == pytest.approx(sum(map(len, ids)) / forwards, rel=0.1)  # some seals ride
    assert (
        found[1, json.dumps(settings[1])]["tokens_per_forward"]
        > 2 * found[1, json.dumps(settings[0])]["tokens_per_forward"]
    )


def test_a_setting_that_the_server_refuses_is_refused_in_its_words(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"text": "a"}')
    for setting, said in (('{"threshold": 3}', "threshold is 3; allowed"), ('{"speed": 1}', "unknown key 'speed'")):
        assert main(["tune", "--url", server.url, "--prompts", str(path), "--setting", setting]) == 1
        out, err = capsys.readouterr()
        assert said in err and err.count("\n") == 1 and out == ""
