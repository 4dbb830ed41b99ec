"""Entry points, hooks per mode, and what becomes of the server arguments of a LLaDA2 model."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import Any

import pytest

from sglang_llada import accelerator, plugin
from sglang_llada.config import DEFAULT_MAX_RUNNING_REQUESTS, Mode
from sglang_llada.errors import ConfigError
from sglang_llada.host import earlier, facts
from sglang_llada.host.seam import check, install, refuse
from sglang_llada.llada2.checkpoint import CheckpointFacts, read_config
from sglang_llada.llada2.config import Llada2Config
from tests.adapters import fields, write_adapter
from tests.host import warm

pytestmark = pytest.mark.host

ROOT = Path(__file__).parents[2]
T, MASK = 8, 77  # of the checkpoint below; the host's table says 32 and 156895
FACTS = CheckpointFacts(T, MASK, frozenset(), 100)

REPORT = """
import json, sys
from sglang.srt.plugins import load_plugins
load_plugins()
from sglang_llada.plugin import register
register()  # a second time
from sglang.srt.arg_groups.resolution_hooks import _HOOKS
from sglang.srt.plugins.hook_registry import HookRegistry
registry_imported = "sglang.srt.models.registry" in sys.modules
from sglang.srt.dllm.algorithm import algo_name_to_cls
from sglang.srt.managers.scheduler import Scheduler
from transformers import AutoConfig
print(json.dumps({
    "scheduler": Scheduler.__name__,
    "steps": {name: len(hooks) for name, hooks in _HOOKS.items()},
    "hooks": {target: len(hooks) for target, hooks in HookRegistry._hooks.items() if "smg" not in str(hooks)},
    "patched": sorted(HookRegistry._patched),
    "algorithms": {name: cls.__module__ for name, cls in algo_name_to_cls.items()},
    "registry imported": registry_imported,
    "config": type(AutoConfig.for_model("llada2_moe")).__module__,
}))
"""


def loaded(mode: str) -> dict[str, Any]:
    """What a fresh process looks like once the host has loaded its plugins."""
    done = warm.run_python(["-c", REPORT], warm.environment() | {"SGLANG_LLADA": mode}, ROOT)
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return report


@pytest.mark.slow
def test_mode_on_puts_everything_of_ours_in_place_once() -> None:
    report = loaded("on")
    assert report["scheduler"] == "LladaScheduler"
    assert report["algorithms"]["Threshold"] == "sglang_llada.host.start.algorithm"
    assert report["algorithms"]["LowConfidence"].startswith("sglang.")  # other architectures use it
    assert report["config"] == "sglang_llada.llada2.config"
    assert report["steps"] == {"handle_missing_default_values": 1, "handle_dllm_inference": 1}
    assert set(report["hooks"].values()) == {1}
    assert set(report["hooks"]) <= set(report["patched"])  # the host only logs a hook that finds no target
    assert not report["registry imported"]  # 3 s in processes that never look a model up


@pytest.mark.slow
def test_mode_off_leaves_the_stock_code_in_place() -> None:
    report = loaded("off")
    assert report["scheduler"] == "Scheduler"
    assert "Threshold" not in report["algorithms"]
    assert report["config"] == "sglang_llada.host.start.stock"
    assert report["steps"] == {"handle_missing_default_values": 1}
    assert "sglang.srt.dllm.config.DllmConfig.from_server_args" in report["patched"]
    assert "sglang.srt.model_loader.utils.get_model_architecture" not in report["hooks"]


@pytest.mark.parametrize(
    ("group", "function"),
    [("sglang.srt.plugins", plugin.register), ("sglang.srt.platforms", plugin.activate)],
)
def test_one_entry_point_of_one_name_in_each_group(group: str, function: object) -> None:
    ours = [e for e in importlib.metadata.entry_points(group=group) if e.dist and e.dist.name == "sglang-llada"]
    assert [(e.name, e.load()) for e in ours] == [("sglang_llada", function)]


def test_unknown_mode_stops_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_LLADA", "maybe")
    with pytest.raises(SystemExit, match="SGLANG_LLADA is 'maybe'; allowed: 'on' or 'off'"):
        plugin.register()


@pytest.mark.parametrize("mode", Mode)
def test_on_a_host_that_fits_no_table_models_are_refused_and_nothing_is_hooked(
    monkeypatch: pytest.MonkeyPatch, mode: Mode
) -> None:
    hooked: list[str] = []
    monkeypatch.setenv("SGLANG_LLADA", mode.value)
    monkeypatch.setattr(check, "fits", lambda: False)
    monkeypatch.setattr(refuse, "refuse_models", lambda: hooked.append("refuse_models"))
    for name in (
        "register_config",
        "hook_arguments",
        "prepare_cpu",
        "hook_model_class",
        "replace_scheduler",
        "hook_graphs",
    ):
        monkeypatch.setattr(install, name, lambda *_, name=name: hooked.append(name))
    install.install.cache_clear()
    plugin.register()
    install.install.cache_clear()
    assert hooked == ["refuse_models"]


REFUSED = """
import sys
from sglang_llada.host.seam import check
check.mismatch = lambda: SystemExit("refused")
from sglang_llada.host.seam.refuse import refuse_models
refuse_models()
from transformers import AutoConfig
AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=True)
"""


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"model_type": "llada2_moe"}, "refused"),
        ({"model_type": "llada2_moe_veomni"}, "refused"),
        ({"model_type": "llada2_moe", "auto_map": {"AutoConfig": "code.Config"}}, "refused"),
        ({"model_type": "llama"}, ""),
    ],
)
def test_whoever_reads_a_refused_checkpoint_ends(tmp_path: Path, fields: dict[str, Any], said: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(fields))
    done = warm.run_python(["-c", REFUSED, str(tmp_path)], warm.environment(), ROOT)
    assert done.stderr.splitlines()[-1:] == ([said] if said else []), done.stderr
    assert done.returncode == (said != "")


@pytest.mark.parametrize("fit", [True, False])
def test_our_platform_is_for_hosts_that_fit(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fit: bool
) -> None:
    monkeypatch.setattr(accelerator, "activate_platform", lambda: accelerator.PLATFORM)
    monkeypatch.setattr(check, "fits", lambda: fit)
    monkeypatch.setattr(check, "mismatch", lambda: SystemExit("what differs"))
    assert plugin.activate() == (accelerator.PLATFORM if fit else None)
    assert caplog.messages == ([] if fit else ["what differs"])


def test_on_a_machine_with_a_device_no_time_goes_into_the_platform(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerator, "activate_platform", lambda: None)
    monkeypatch.delattr(check, "fits")
    assert plugin.activate() is None


def test_any_other_failure_stops_the_process_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(mode: Mode) -> None:
        raise ImportError("no such module")

    monkeypatch.setattr(install, "register_config", fail)
    install.install.cache_clear()
    with pytest.raises(SystemExit, match="cannot start: ImportError: no such module"):
        plugin.register()


# --- server arguments -----------------------------------------------------------------------------------------------


@pytest.fixture
def arguments(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module under test, with the facts of a checkpoint that needs no files."""
    from sglang_llada.host.start import arguments

    monkeypatch.setattr(arguments, "facts_of", lambda path, revision: FACTS)
    monkeypatch.setattr(arguments, "check_files", lambda folder, declared: None)
    monkeypatch.setattr(arguments, "read_config", lambda folder: Llada2Config())
    return arguments


@pytest.fixture
def llada2(tmp_path: Path) -> str:
    """A folder that says it is a LLaDA2 model."""
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["LLaDA2MoeModelLM"]}))
    return str(tmp_path)


@pytest.fixture
def other(tmp_path: Path) -> str:
    """A folder that says it is another model."""
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    return str(tmp_path)


def filled(arguments: Any, mode: Mode, **given: Any) -> Any:
    """The host's view of its arguments after ours are filled in."""
    from sglang.srt.server_args import ServerArgs

    server_args = ServerArgs(**given)
    arguments.fill_in(server_args, mode)
    return arguments.resolving_view(server_args)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Pretends that torch sees a card of a compute capability."""
    import torch

    return lambda *capability: monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)])
def test_on_a_gpu_attention_is_ours(arguments: Any, llada2: str, card: Any, capability: tuple[int, int]) -> None:
    card(*capability)
    for determinism in (False, True):
        given = {"enable_deterministic_inference": determinism}
        args = filled(arguments, Mode.ON, model_path=llada2, device="cuda", **given)
        assert args.attention_backend == "llada_rows"
    from sglang_llada.host.start.algorithm import OwnAlgorithm

    assert args.attention_backend in OwnAlgorithm.supported_attention_backends  # or graphs would make it flashinfer


@pytest.mark.parametrize("flag", ["attention_backend", "prefill_attention_backend", "decode_attention_backend"])
def test_on_a_gpu_the_users_attention_wins(arguments: Any, llada2: str, card: Any, flag: str) -> None:
    card(9, 0)
    given = {"model_path": llada2, "device": "cuda", flag: "flashinfer"}
    args = filled(arguments, Mode.ON, **given)
    assert args.attention_backend == given.get("attention_backend")


@pytest.mark.parametrize(
    ("capability", "head_dim", "given", "named"),
    [
        ((7, 5), 128, {}, "compute capability 7.5"),
        ((9, 0), 96, {}, "heads of 96"),
        ((7, 5), 32, {}, "compute capability 7.5"),
        ((9, 0), 128, {"kv_cache_dtype": "nvfp4"}, "--kv-cache-dtype nvfp4"),
        ((8, 6), 128, {"kv_cache_dtype": "fp8_e4m3"}, "--kv-cache-dtype fp8_e4m3 below compute capability 8.9"),
    ],
)
def test_what_our_kernel_does_not_know_is_left_to_another_and_named(
    arguments: Any,
    llada2: str,
    card: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capability: tuple[int, int],
    head_dim: int,
    given: dict[str, Any],
    named: str,
) -> None:
    card(*capability)
    monkeypatch.setattr(arguments, "read_config", lambda folder: Llada2Config(head_dim=head_dim))
    args = filled(arguments, Mode.ON, model_path=llada2, device="cuda", **given)
    assert args.attention_backend == (None if head_dim == 128 else "triton")  # the host would take flashinfer
    (said,) = [message for message in caplog.messages if "cannot serve" in message]
    assert named in said


@pytest.mark.parametrize("head_dim", [16, 32])
def test_heads_that_flashinfer_does_not_have_are_ours_with_a_line_that_says_so(
    arguments: Any,
    llada2: str,
    card: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    head_dim: int,
) -> None:
    caplog.set_level("INFO", "sglang_llada")
    card(9, 0)
    monkeypatch.setattr(arguments, "read_config", lambda folder: Llada2Config(head_dim=head_dim))
    assert filled(arguments, Mode.ON, model_path=llada2, device="cuda").attention_backend == "llada_rows"
    assert caplog.messages.count("--attention-backend is llada_rows") == 1


@pytest.mark.parametrize("flag", ["attention_backend", "prefill_attention_backend", "decode_attention_backend"])
def test_flashinfer_is_refused_for_heads_that_it_does_not_have(
    arguments: Any, llada2: str, card: Any, monkeypatch: pytest.MonkeyPatch, flag: str
) -> None:
    card(9, 0)
    monkeypatch.setattr(arguments, "read_config", lambda folder: Llada2Config(head_dim=32))
    with pytest.raises(ConfigError, match="no heads of 32; allowed: triton, torch_native, llada_rows"):
        filled(arguments, Mode.ON, model_path=llada2, device="cuda", **{flag: "flashinfer"})


def test_fp32_is_refused_on_a_gpu(arguments: Any, llada2: str, card: Any) -> None:
    card(9, 0)
    with pytest.raises(ConfigError, match="--dtype is float32"):
        filled(arguments, Mode.ON, model_path=llada2, device="cuda", dtype="float32")


def test_the_command_line_accepts_our_attention(arguments: Any) -> None:
    from sglang.srt.arg_groups.choices import ATTENTION_BACKEND_CHOICES

    plugin.register()
    assert "llada_rows" in ATTENTION_BACKEND_CHOICES


def test_model_path_alone_is_enough(arguments: Any, llada2: str) -> None:
    args = filled(arguments, Mode.ON, model_path=llada2)
    assert args.dllm_algorithm == "Threshold"
    assert args.max_running_requests == DEFAULT_MAX_RUNNING_REQUESTS
    assert args.page_size == T


def test_mode_off_serves_the_stock_algorithm(arguments: Any, llada2: str) -> None:
    args = filled(arguments, Mode.OFF, model_path=llada2)
    assert args.dllm_algorithm == "LowConfidence"
    assert args.max_running_requests == DEFAULT_MAX_RUNNING_REQUESTS
    assert args.page_size is None  # the host sets it


def test_what_the_user_sets_stays(arguments: Any, llada2: str) -> None:
    args = filled(arguments, Mode.ON, model_path=llada2, max_running_requests=3, page_size=T)
    assert (args.max_running_requests, args.page_size) == (3, T)
    assert filled(arguments, Mode.OFF, model_path=llada2, dllm_algorithm="JointThreshold").dllm_algorithm == (
        "JointThreshold"
    )


@pytest.mark.parametrize(("stock", "ours"), [("LowConfidence", "Threshold"), ("JointThreshold", "TokenEditing")])
def test_stock_name_of_our_rule_is_an_alias(arguments: Any, llada2: str, stock: str, ours: str) -> None:
    assert filled(arguments, Mode.ON, model_path=llada2, dllm_algorithm=stock).dllm_algorithm == ours


def test_other_algorithms_are_refused(arguments: Any, llada2: str) -> None:
    with pytest.raises(ConfigError, match="'Uniform'; allowed: Threshold, LowConfidence"):
        filled(arguments, Mode.ON, model_path=llada2, dllm_algorithm="Uniform")


def test_page_size_must_be_the_block_size(arguments: Any, llada2: str) -> None:
    with pytest.raises(ConfigError, match=f"--page-size is {2 * T}; allowed: {T}"):
        filled(arguments, Mode.ON, model_path=llada2, page_size=2 * T)


@pytest.mark.parametrize("mode", Mode)
def test_other_models_pass_untouched(arguments: Any, other: str, mode: Mode) -> None:
    args = filled(arguments, mode, model_path=other, pp_size=2)
    assert (args.dllm_algorithm, args.max_running_requests, args.page_size) == (None, None, None)


@pytest.mark.parametrize("path", ["/nowhere/model", "s3://bucket/model"])
def test_a_model_that_cannot_be_read_is_left_to_the_host(
    arguments: Any, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(facts, "fetch_config", lambda repository, revision: {})
    assert filled(arguments, Mode.ON, model_path=path).dllm_algorithm is None


ASKING = {
    "--pp-size above 1": {"pp_size": 2},
    "--attn-cp-size or --dcp-size above 1": {"tp_size": 2, "attn_cp_size": 2},
    "--disaggregation-mode": {"disaggregation_mode": "prefill"},
    "--speculative-algorithm": {"speculative_algorithm": "EAGLE"},
    "--enable-lora with --enable-dp-attention": {
        "enable_lora": True,
        "tp_size": 2,
        "dp_size": 2,
        "enable_dp_attention": True,
    },
    "--enable-lora with --enable-eplb, --ep-num-redundant-experts or --init-expert-location": {
        "lora_paths": ["a=b"],
        "enable_eplb": True,
    },
    "--enable-lora with this release of SGLang": {"enable_lora": True},
    "--enable-lora-overlap-loading": {"enable_lora_overlap_loading": True},
    "--experts-shared-outer-loras or --lora-use-virtual-experts": {"lora_use_virtual_experts": True},
    "--hicache-host-memory-mode buffer_only": {"hicache_host_memory_mode": "buffer_only"},
    "--enable-unified-cache-external-linker": {"enable_unified_cache_external_linker": True},
    "--enable-lmcache": {"enable_lmcache": True},
    "--enable-flexkv": {"enable_flexkv": True},
    "--enable-mixed-chunk": {"enable_mixed_chunk": True},
    "--no-dllm-fdfo": {"dllm_fdfo": False},
    "--is-embedding": {"is_embedding": True},
    "--rl-on-policy-target": {"rl_on_policy_target": "fsdp"},
    "--enable-two-batch-overlap": {"enable_two_batch_overlap": True},
    "--attention-backend other than flashinfer, triton, torch_native, llada_rows": {"attention_backend": "fa3"},
    "CUDA graphs of prefills": {"cuda_graph_backend_prefill": "breakable"},
    "--tokenizer-worker-num above 1 with this release of SGLang, whose HTTP processes load no plugins": {
        "tokenizer_worker_num": 2
    },
}


@pytest.fixture
def earlier_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """A release whose further HTTP processes load no plugins, and which has other layers with adapters."""
    monkeypatch.setattr(earlier, "names_http_app", lambda: False)
    monkeypatch.setattr(earlier, "adds_adapters", lambda: False)


def test_every_refusal_is_tested(arguments: Any) -> None:
    assert set(ASKING) == {refusal.option for refusal in arguments.REFUSALS}


def test_the_page_of_refusals_has_each_with_what_to_use_instead(arguments: Any) -> None:
    page = (ROOT / "docs" / "refusals.md").read_text(encoding="utf-8").replace("`", "")
    rows = [tuple(cell.strip() for cell in line.split("|")[1:4]) for line in page.partition("\n## ")[0].splitlines()]
    wanted = [(refusal.option, refusal.instead) for refusal in arguments.REFUSALS]
    assert [(option, instead) for option, instead, why in (row for row in rows if len(row) == 3)][2:] == wanted


@pytest.mark.parametrize("option", ASKING)
@pytest.mark.usefixtures("earlier_host")
def test_unsupported_options_are_refused_by_name(arguments: Any, llada2: str, option: str) -> None:
    with pytest.raises(ConfigError) as error:
        filled(arguments, Mode.ON, model_path=llada2, **ASKING[option])
    assert option in str(error.value)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"tp_size": 3}, ["16 attention heads do not divide over 3 ranks", "4 KV heads", "width 5120 and 512"]),
        ({"tp_size": 32}, ["16 attention heads do not divide over 32 ranks"]),
        ({"tp_size": 8, "ep_size": 3}, ["--ep-size 3 does not divide --tp-size 8", "256 experts"]),
        ({"tp_size": 2, "dp_size": 3, "enable_dp_attention": True}, ["3 ranks of DP attention", "--tp-size 2"]),
        ({"tp_size": 6, "dp_size": 2, "enable_dp_attention": True}, ["16 attention heads do not divide over 3 ranks"]),
    ],
)
def test_sizes_that_do_not_divide_over_the_ranks_are_refused(
    arguments: Any, llada2: str, given: dict[str, Any], said: list[str]
) -> None:
    with pytest.raises(ConfigError) as error:
        filled(arguments, Mode.ON, model_path=llada2, **given)
    assert all(words in str(error.value) for words in said)


@pytest.mark.parametrize(
    "given", [{"tp_size": 8, "ep_size": 8}, {"tp_size": 2, "dp_size": 2, "enable_dp_attention": True}]
)
def test_sizes_that_divide_are_served(arguments: Any, llada2: str, given: dict[str, Any]) -> None:
    """Of 4 KV heads, each goes to 2 of 8 ranks."""
    args = filled(arguments, Mode.ON, model_path=llada2, **given)
    assert args.enable_dp_lm_head == ("dp_size" in given)


def test_all_unsupported_options_are_named_at_once(arguments: Any, llada2: str) -> None:
    with pytest.raises(ConfigError) as error:
        filled(arguments, Mode.ON, model_path=llada2, pp_size=2, enable_lmcache=True)
    assert "--pp-size above 1 (instead: --tp-size and --ep-size); --enable-lmcache (instead: " in str(error.value)


def test_mode_off_leaves_refusing_to_the_host(arguments: Any, llada2: str) -> None:
    assert filled(arguments, Mode.OFF, model_path=llada2, pp_size=2).pp_size == 2


@pytest.mark.parametrize(("mode", "ours"), [(Mode.ON, True), (Mode.OFF, False)])
def test_a_server_is_ours_in_mode_on_only(arguments: Any, llada2: str, mode: Mode, ours: bool) -> None:
    from sglang.srt.server_args import ServerArgs

    server_args = ServerArgs(model_path=llada2)
    arguments.fill_in(server_args, mode)
    assert facts.is_ours(server_args) is ours


@pytest.mark.parametrize("given", [{}, {"dllm_algorithm": "LowConfidence"}])
def test_a_server_of_another_model_is_not_ours(arguments: Any, other: str, given: dict[str, str]) -> None:
    from sglang.srt.server_args import ServerArgs

    server_args = ServerArgs(model_path=other, **given)
    arguments.fill_in(server_args, Mode.ON)
    assert not facts.is_ours(server_args)


@pytest.mark.parametrize(
    ("given", "most"),
    [
        ({}, 2 * DEFAULT_MAX_RUNNING_REQUESTS),
        ({"max_running_requests": 5}, 10),
        ({"max_running_requests": 5000}, 8192 // T),
        ({"max_running_requests": 5000, "chunked_prefill_size": 20 * T}, 20),
        ({"cuda_graph_max_bs_decode": 7}, 7),
        ({"cuda_graph_bs_decode": [1, 2]}, None),
        ({"cuda_graph_config": {"decode": {"max_bs": 3}}}, None),
    ],
)
def test_graphs_are_captured_for_two_rows_a_request_unless_the_user_says(
    arguments: Any, llada2: str, card: Any, given: dict[str, Any], most: int | None
) -> None:
    card(9, 0)
    args = filled(arguments, Mode.ON, model_path=llada2, device="cuda", **given)
    assert args.cuda_graph_max_bs_decode == most
    assert args.disable_prefill_cuda_graph


def test_few_graphs_are_captured_on_the_cpu(arguments: Any, llada2: str) -> None:
    args = filled(arguments, Mode.ON, model_path=llada2, device="cpu", max_running_requests=10)
    assert args.cuda_graph_bs_decode == [1, 2, 4, 8, 16, 20]


def test_prefill_graphs_of_a_configuration_are_refused_too(arguments: Any, llada2: str) -> None:
    with pytest.raises(ConfigError, match="CUDA graphs of prefills"):
        filled(arguments, Mode.ON, model_path=llada2, cuda_graph_config={"prefill": {"backend": "full"}})


# --- facts of the checkpoint ----------------------------------------------------------------------------------------


def corrected(arguments: Any, model_path: str, mode: Mode, **algorithm_config: Any) -> Any:
    """The host's DllmConfig as its table has it, then corrected."""
    from sglang.srt.dllm.config import DllmConfig
    from sglang.srt.server_args import ServerArgs

    block_size = algorithm_config.get("block_size", 32)
    algorithm = "Threshold" if mode is Mode.ON else "LowConfidence"
    config = DllmConfig(algorithm, algorithm_config, block_size, 156895, max_running_requests=1)
    return arguments.correct_facts(config, ServerArgs(model_path=model_path), mode)


@pytest.mark.parametrize("mode", Mode)
def test_block_size_and_mask_id_come_from_the_checkpoint(arguments: Any, llada2: str, mode: Mode) -> None:
    config = corrected(arguments, llada2, mode)
    assert (config.block_size, config.mask_id) == (T, MASK)


@pytest.mark.parametrize("mode", Mode)
def test_facts_of_other_models_stay(arguments: Any, other: str, mode: Mode) -> None:
    config = corrected(arguments, other, mode)
    assert (config.block_size, config.mask_id) == (32, 156895)


def test_mode_off_keeps_the_block_size_that_the_user_set(arguments: Any, llada2: str) -> None:
    assert corrected(arguments, llada2, Mode.OFF, block_size=4).block_size == 4


def test_no_diffusion_config_stays_none(arguments: Any, llada2: str) -> None:
    from sglang.srt.server_args import ServerArgs

    assert arguments.correct_facts(None, ServerArgs(model_path=llada2), Mode.ON) is None


def test_decode_parameters_are_checked_at_start(arguments: Any, llada2: str) -> None:
    with pytest.raises(ConfigError, match=f"--dllm-algorithm-config: block_size is 4; allowed: {T}"):
        corrected(arguments, llada2, Mode.ON, block_size=4)
    with pytest.raises(ConfigError, match=f"steps is {T + 1}; allowed: an integer from 1 to {T}"):
        corrected(arguments, llada2, Mode.ON, steps=T + 1)


def test_decode_config_is_what_the_file_says(arguments: Any, llada2: str) -> None:
    config = facts.decode_config(corrected(arguments, llada2, Mode.ON, threshold=0.5), FACTS)
    assert (config.algorithm, config.threshold, config.steps) == ("threshold", 0.5, T)


# --- adapters ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def adapter(llada2: str, tmp_path: Path) -> Path:
    """An adapter that fits the model."""
    return write_adapter(tmp_path / "adapter", read_config(Path(llada2)), rank=2, seed=0, targets=("dense",))


def test_adapters_are_kept_and_nothing_is_captured_beside_them(
    arguments: Any, llada2: str, adapter: Path, card: Any
) -> None:
    card(9, 0)
    args = filled(arguments, Mode.ON, model_path=llada2, device="cpu", lora_paths=[f"mine={adapter}"])
    assert (args.enable_lora, args.disable_decode_cuda_graph, args.lora_backend) == (True, True, "llada_rows")
    assert args.lora_target_modules is None, "the host takes those of the adapters"
    args = filled(arguments, Mode.ON, model_path=llada2, device="cuda", enable_lora=True, max_lora_rank=8)
    assert args.lora_backend == "csgmv"
    assert args.lora_target_modules == ["down_proj", "gate_up_proj", "o_proj", "qkv_proj"]


def test_half_of_the_feed_forward_layers_means_both(arguments: Any, llada2: str) -> None:
    given = {"enable_lora": True, "max_lora_rank": 8, "lora_target_modules": ["up_proj", "k_proj"]}
    args = filled(arguments, Mode.ON, model_path=llada2, **given)
    assert args.lora_target_modules == ["down_proj", "gate_up_proj", "qkv_proj"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"enable_lora": True}, "needs --max-lora-rank"),
        ({"enable_lora": True, "max_lora_rank": 8, "lora_target_modules": ["lm_head"]}, "lm_head; allowed: all"),
        ({"lora_paths": ["mine=/nowhere/at/all"]}, "--lora-paths mine: '/nowhere/at/all'"),
    ],
)
def test_adapters_that_cannot_be_served_are_refused_at_the_start(
    arguments: Any, llada2: str, given: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        filled(arguments, Mode.ON, model_path=llada2, **given)


@pytest.mark.parametrize("form", ["{path}", "mine={path}", {"lora_name": "mine", "lora_path": "{path}"}])
def test_an_adapter_that_does_not_fit_is_named_at_the_start(
    arguments: Any, llada2: str, adapter: Path, form: Any
) -> None:
    (adapter / "adapter_config.json").write_text(json.dumps(fields(3, ("dense",))))
    filled_in = form | {"lora_path": str(adapter)} if isinstance(form, dict) else form.format(path=adapter)
    with pytest.raises(ConfigError, match=r"layers.0.attention.dense.lora_A.weight has shape \[2, "):
        filled(arguments, Mode.ON, model_path=llada2, lora_paths=[filled_in])


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"max_lora_rank": 1}, "its rank is 2; allowed: up to 1, as --max-lora-rank is"),
        ({"lora_target_modules": ["q_proj"]}, "it has o_proj, which --lora-target-modules does not"),
    ],
)
def test_adapters_that_have_no_room_are_refused_at_the_start(
    arguments: Any, llada2: str, adapter: Path, given: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        filled(arguments, Mode.ON, model_path=llada2, lora_paths=[str(adapter)], **given)
    enough = {"max_lora_rank": 2, "lora_target_modules": ["o_proj"]}
    assert filled(arguments, Mode.ON, model_path=llada2, lora_paths=[str(adapter)], **enough).enable_lora


def test_adapters_and_a_replay_of_graphs_are_refused_together(
    arguments: Any, llada2: str, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SGLANG_LLADA_REPLAY", "1")
    with pytest.raises(ConfigError, match="no CUDA graph has steps with adapters"):
        filled(arguments, Mode.ON, model_path=llada2, lora_paths=[str(adapter)])
