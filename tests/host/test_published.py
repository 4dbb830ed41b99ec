"""Published layouts in the host: its AutoConfig reads them in both modes, and its plain command serves them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from sglang_llada.__main__ import main
from sglang_llada.config import Mode
from sglang_llada.errors import ConfigError
from sglang_llada.host.hub import folder_of
from sglang_llada.host.seam.install import register_config
from sglang_llada.llada2.report import report
from tests.host.serving import serving
from tests.published.layout import LAYOUTS, published, write
from tests.published.serve import ask, questions

pytestmark = pytest.mark.host


@pytest.fixture(params=Mode)
def mode(request: pytest.FixtureRequest) -> Any:
    """Each mode in turn; the default one is put back."""
    register_config(request.param)
    yield request.param
    register_config(Mode.ON)


@pytest.mark.parametrize("trust", [False, True])
@pytest.mark.parametrize("name", LAYOUTS)
def test_the_hosts_reader_takes_a_published_configuration(name: str, trust: bool, mode: Mode, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(published(name)))  # which names code that is not there
    config = AutoConfig.from_pretrained(tmp_path, trust_remote_code=trust)
    assert type(config).__module__ == (
        "sglang_llada.llada2.config" if mode is Mode.ON else "sglang_llada.host.start.stock"
    )
    assert config.model_type == published(name)["model_type"]
    assert (config.rope_theta, config.rotary_dim) == (3_000_000 if "2.2" in name else 600_000, 64)
    assert config.is_dense(0) and not config.is_dense(1)
    if mode is Mode.OFF:  # what the host's class reads of every checkpoint
        from sglang.srt.utils.hf_transformers.common import get_rope_config

        assert get_rope_config(config)[0] == config.rope_theta
        assert (config.embedding_dropout, config.use_bias, config.hidden_act) == (0.0, False, "silu")
        assert config.moe_shared_expert_intermediate_size == config.moe_intermediate_size


@pytest.mark.parametrize("mode", Mode)
def test_a_model_of_images_stops_the_start(mode: Mode, tmp_path: Path) -> None:
    from sglang.srt.server_args import ServerArgs

    from sglang_llada.host.start.arguments import fill_in

    (tmp_path / "config.json").write_text(json.dumps(published("LLaDA2.0-Uni")))
    with pytest.raises(ConfigError, match="only models of text are served"):
        fill_in(ServerArgs(model_path=str(tmp_path)), mode)


def test_what_nobody_knows_is_said_at_the_start(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from sglang.srt.server_args import ServerArgs

    from sglang_llada.host.start.arguments import fill_in

    folder = write("LLaDA2.0-mini", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"new_trick": 1}))
    fill_in(ServerArgs(model_path=str(folder)), Mode.ON)
    assert [record.message for record in caplog.records if "new_trick" in record.message] == [
        "config.json: nothing is known of new_trick, which changes nothing here"
    ]


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ({"block_size": 16}, "block_size 16 would have no effect; change config.json"),
        ({"delete_token_id": 3, "split_token_id": 4}, "delete_token_id 3, split_token_id 4 would have no effect"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters {'rope_type': 'yarn'} would have no effect"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope_scaling {'rope_type': 'yarn'} would have no effect"),
        ({"rope_theta": 7, "block_size": 32}, None),
    ],
)
def test_an_override_that_would_not_be_heard_is_refused(
    override: dict[str, Any], told: str | None, tmp_path: Path
) -> None:
    from sglang.srt.server_args import ServerArgs

    from sglang_llada.host.start.arguments import fill_in

    folder = write("LLaDA2.0-mini", tmp_path)
    args = ServerArgs(model_path=str(folder), json_model_override_args=json.dumps(override))
    if told is None:
        fill_in(args, Mode.ON)
    else:
        with pytest.raises(ConfigError, match=told):
            fill_in(args, Mode.ON)


def test_check_prints_what_is_read_of_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write("LLaDA2.2-mini-rope-parameters-only", tmp_path)
    assert main(["check", "--model", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "base 10,000 (rope_parameters.rope_theta), 16 of 32 dimensions" in out
    assert "nothing of this is refused" in out
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"norm_head": True}))
    assert main(["check", "--model", str(folder)]) == 1
    assert "refused       config.json: norm_head is True; allowed: False" in capsys.readouterr().out


def test_model_goes_with_check_alone(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["env", "--model", "x"])
    assert "unrecognized arguments: --model" in capsys.readouterr().err


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty local cache of repositories, and no network."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def test_a_repository_is_read_from_the_local_cache(hub: Path, tmp_path: Path) -> None:
    repository = hub / "models--inclusionAI--LLaDA2.1-mini"
    snapshot = repository / "snapshots" / ("0" * 40)
    shutil.copytree(write("LLaDA2.1-mini", tmp_path), snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    name = "inclusionAI/LLaDA2.1-mini"
    said = dict(report(name, folder_of(name)).facts)
    assert said["checkpoint"] == f"inclusionAI/LLaDA2.1-mini, in {snapshot}"
    assert said["algorithm"].startswith("joint_threshold")
    assert said["tensors"] == "189, as config.json asks"


@pytest.mark.parametrize(
    ("model", "told"),
    [
        (
            "inclusionAI/LLaDA2.0-mini",
            "is no folder, and as a repository it is neither in the local Hugging Face cache",
        ),
        ("./not here", "is neither a folder nor the name of a repository"),
    ],
)
def test_a_model_that_is_nowhere_is_said_in_a_sentence(hub: Path, model: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        folder_of(model)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("dFactory-mini-merged", ["--trust-remote-code"]),
        pytest.param("LLaDA2.2-mini-rope-parameters-only", [], marks=pytest.mark.long),
    ],
)
def test_a_published_layout_is_served_by_the_plain_command(name: str, flags: list[str], tmp_path: Path) -> None:
    with serving(write(name, tmp_path), tmp_path / "log", *flags) as server:
        score = ask(server, questions(LAYOUTS[name].trained, each=1))
    assert score.right == score.ended == score.asked
