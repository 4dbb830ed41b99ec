"""The mode and the decode parameters: defaults, ranges at their edges, and what messages say."""

from __future__ import annotations

import dataclasses

import pytest

from sglang_llada import config
from sglang_llada.config import DecodeConfig, Mode
from sglang_llada.errors import ConfigError

T = 32


@pytest.fixture
def base() -> DecodeConfig:
    return DecodeConfig.defaults(T)


@pytest.mark.parametrize(("environ", "mode"), [({}, Mode.ON), ({"SGLANG_LLADA": ""}, Mode.ON)])
def test_mode_is_on_unless_said_otherwise(environ: dict[str, str], mode: Mode) -> None:
    assert config.read_mode(environ) is mode


@pytest.mark.parametrize("mode", Mode)
def test_mode_is_read_by_its_name(mode: Mode) -> None:
    assert config.read_mode({"SGLANG_LLADA": mode.value}) is mode


@pytest.mark.parametrize("value", ["ON", "1", "true", " off"])
def test_unknown_mode_names_value_and_allowed(value: str) -> None:
    with pytest.raises(ConfigError, match=f"SGLANG_LLADA is '{value}'; allowed: 'on' or 'off'"):
        config.read_mode({"SGLANG_LLADA": value})


def test_defaults_take_steps_from_the_block_size(base: DecodeConfig) -> None:
    assert base == DecodeConfig(algorithm="threshold", block_size=T, threshold=0.95, steps=T)
    assert DecodeConfig.defaults(8).steps == 8


def test_unknown_algorithm_is_refused() -> None:
    with pytest.raises(ConfigError, match="'greedy'; allowed: threshold"):
        DecodeConfig.defaults(T, "greedy")


def test_every_algorithm_has_defaults_within_its_ranges() -> None:
    for algorithm, parameters in config.ALGORITHMS.items():
        made = DecodeConfig.defaults(T, algorithm, indel=True)
        assert made.replaced({p.name: getattr(made, p.name) for p in parameters}) == made
        assert made.steps <= T  # progress: a bound on the steps of a block


def test_replaced_changes_only_what_is_named(base: DecodeConfig) -> None:
    assert base.replaced({"threshold": 0.5}) == dataclasses.replace(base, threshold=0.5)
    assert base.replaced({"steps": 4}) == dataclasses.replace(base, steps=4)
    assert base.threshold == 0.95


@pytest.mark.parametrize("mapping", [None, {}])
def test_empty_mapping_changes_nothing(base: DecodeConfig, mapping: dict[str, object] | None) -> None:
    assert base.replaced(mapping) is base or base.replaced(mapping) == base


def test_request_is_laid_over_the_server(base: DecodeConfig) -> None:
    server = base.replaced({"threshold": 0.8, "steps": 16}, "--dllm-algorithm-config")
    assert server.replaced({"steps": 2}) == dataclasses.replace(base, threshold=0.8, steps=2)


@pytest.mark.parametrize(
    "mapping",
    [{"threshold": 0}, {"threshold": 0.0}, {"threshold": 1}, {"threshold": 1.0}, {"steps": 1}, {"steps": T}],
)
def test_edges_of_the_ranges_are_allowed(base: DecodeConfig, mapping: dict[str, float]) -> None:
    made = base.replaced(mapping)
    assert isinstance(made.threshold, float)
    assert isinstance(made.steps, int)


@pytest.mark.parametrize("value", [-0.01, 1.01, float("nan"), float("inf"), "0.5", None, True, [0.5]])
def test_threshold_outside_its_range_is_refused(base: DecodeConfig, value: object) -> None:
    with pytest.raises(ConfigError) as error:
        base.replaced({"threshold": value})
    assert f"threshold is {value!r}; allowed: a number from 0.0 to 1.0" in str(error.value)


@pytest.mark.parametrize("value", [0, -1, T + 1, 4.0, "4", None, False])
def test_steps_outside_their_range_are_refused(base: DecodeConfig, value: object) -> None:
    with pytest.raises(ConfigError) as error:
        base.replaced({"steps": value})
    assert f"steps is {value!r}; allowed: an integer from 1 to {T}" in str(error.value)


def test_unknown_keys_are_named_with_the_allowed_ones(base: DecodeConfig) -> None:
    with pytest.raises(ConfigError) as error:
        base.replaced({"threshold": 0.5, "treshold": 0.5, "blocks": 4}, "--dllm-algorithm-config")
    assert str(error.value) == (
        "--dllm-algorithm-config: unknown key 'treshold', 'blocks'; allowed: threshold, steps, early_exit, "
        "max_nfe, live_blocks, next_block_share, trace, stream_mode, algorithm"
    )


@pytest.mark.parametrize("value", [0.5, "threshold", ["threshold"]])
def test_what_is_no_mapping_is_refused(base: DecodeConfig, value: object) -> None:
    with pytest.raises(ConfigError, match="custom_params: got .* needed is a mapping"):
        base.replaced(value)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("algorithm", "flags"),
    [
        ("threshold", ["Threshold", "LowConfidence"]),
        ("joint_threshold", ["TokenEditing", "JointThreshold"]),
        ("levenshtein", ["Levenshtein", "JointThresholdInDel"]),
    ],
)
def test_flag_and_its_alias_mean_one_algorithm(algorithm: str, flags: list[str]) -> None:
    assert [config.algorithm_of_flag(flag) for flag in flags] == [algorithm] * 2
    assert config.flag_of(algorithm) == flags[0]


@pytest.mark.parametrize(
    ("name", "indel", "flag"),
    [
        ("inclusionAI/LLaDA2.0-flash", False, "Threshold"),
        ("inclusionAI/LLaDA2.1-mini", False, "TokenEditing"),
        ("/models/models--inclusionAI--LLaDA2.1-flash/snapshots/0a1b", False, "TokenEditing"),
        ("/llada2.1/tiny-llada2.0", False, "Threshold"),  # the last name counts
        ("inclusionAI/LLaDA2.2-flash", False, "TokenEditing"),  # nearest to what it can do without its two tokens
        ("inclusionAI/LLaDA2.2-flash", True, "Levenshtein"),
        ("/models/mine", True, "Levenshtein"),
        ("/models/mine", False, "Threshold"),
    ],
)
def test_a_checkpoint_says_how_it_is_decoded(name: str, indel: bool, flag: str) -> None:
    assert config.flag_of_checkpoint(name, indel=indel) == flag


def test_a_flag_of_the_budget_is_true_or_false() -> None:
    base = DecodeConfig.defaults(T, "levenshtein", indel=True)
    assert base.replaced({"cumulative_budget": True}).cumulative_budget is True
    with pytest.raises(ConfigError, match="cumulative_budget is 1; allowed: true or false"):
        base.replaced({"cumulative_budget": 1})


def test_a_request_may_take_another_algorithm(base: DecodeConfig) -> None:
    editing = base.replaced({"algorithm": "joint_threshold"})
    assert (editing.threshold, editing.edit_threshold, editing.max_post_edit_steps) == (0.7, 0.5, 16)
    assert editing.replaced({"algorithm": "joint_threshold", "max_post_edit_steps": 3}).max_post_edit_steps == 3
    assert editing.replaced({"algorithm": "threshold"}) == base


def test_multi_block_editing_is_token_editing_in_a_window_of_two(base: DecodeConfig) -> None:
    several = base.replaced({"algorithm": "mbe", "mode": "speed"})
    assert several == base.replaced({"algorithm": "joint_threshold", "mode": "speed", "window": 2})
    assert several.replaced({"window": 3}).window == 3


JOINT, INDEL = "joint_threshold", "levenshtein"
# What others' files and calls say, as it is published, and what it must mean here.
MOVED: dict[str, tuple[str, dict[str, object], dict[str, object]]] = {
    "SGLang's documentation, LowConfidence": ("threshold", {"threshold": 0.95, "block_size": T}, {"threshold": 0.95}),
    "SGLang's documentation, JointThreshold": (
        JOINT,
        {"threshold": 0.5, "edit_threshold": 0.0, "max_post_edit_steps": 16, "penalty_lambda": 0},
        {"threshold": 0.5, "edit_threshold": 0.0},
    ),
    "SGLang's recommendation against repetitions": (
        JOINT,
        {"threshold": 0.5, "edit_threshold": 0, "penalty_lambda": 3, "vectorized_decoding": True},
        {"threshold": 0.5, "edit_threshold": 0.0, "penalty_lambda": 3.0},
    ),
    "model card of 2.0": (
        "threshold",
        {"eos_early_stop": True, "block_length": 32, "steps": 32, "threshold": 0.95, "minimal_topk": 1},
        {"threshold": 0.95, "steps": 32, "early_exit": True},
    ),
    "model card of 2.1, speed": (
        JOINT,
        {"eos_early_stop": True, "block_length": 32, "threshold": 0.5, "editing_threshold": 0.0, "max_post_steps": 16},
        {"threshold": 0.5, "edit_threshold": 0.0, "max_post_edit_steps": 16},
    ),
    "model card of 2.1, all arguments": (
        JOINT,
        {"steps": 32, "threshold": 0.7, "editing_threshold": 0.5, "num_to_transfer": 1, "top_p": None, "top_k": None},
        {"threshold": 0.7, "edit_threshold": 0.5},
    ),
    "model card of 2.2": (
        INDEL,
        {"block_length": 32, "threshold": 0.5, "editing_threshold": 0.0, "steps": 16},
        {"threshold": 0.5, "edit_threshold": 0.0, "steps": 16},
    ),
    "diffusers": (
        JOINT,
        {
            "block_length": 32,
            "num_inference_steps": 32,
            "threshold": 0.7,
            "editing_threshold": 0.5,
            "max_post_steps": 8,
            "minimal_topk": 1,
            "sampling_method": "multinomial",
            "mask_token_id": None,
        },
        {"threshold": 0.7, "edit_threshold": 0.5, "max_post_edit_steps": 8},
    ),
    "diffusers, without edits": (
        "threshold",
        {"num_inference_steps": 8, "editing_threshold": None, "eos_early_stop": False},
        {"steps": 8, "early_exit": False},
    ),
    "dInfer": (
        "threshold",
        {
            "threshold": 0.9,
            "cache": "prefix",
            "early_stop": True,
            "cont_weight": 0,
            "prefix_look": 0,
            "after_look": 0,
            "warmup_steps": 0,
            "enable_torch_compile": True,
            "parallel_decoding": "threshold",
            "use_credit": False,
            "use_bd": True,
        },
        {"threshold": 0.9},
    ),
    "step maps": ("threshold", {"return_step_maps": True}, {"trace": True}),
}


@pytest.mark.parametrize("name", MOVED)
def test_keys_of_other_programs_mean_what_they_mean_there(name: str) -> None:
    algorithm, theirs, ours = MOVED[name]
    base = DecodeConfig.defaults(T, algorithm, indel=True)
    assert base.replaced(theirs) == dataclasses.replace(base, **ours)  # type: ignore[arg-type]
    assert base.replaced({**theirs, "algorithm": algorithm}) == base.replaced(ours)


@pytest.mark.parametrize(
    ("algorithm", "mapping", "message"),
    [
        ("threshold", {"block_size": 8}, "block_size is 8; allowed: 32, the checkpoint's block size"),
        ("threshold", {"block_length": 64}, "block_length is 64; allowed: 32, the checkpoint's block size"),
        ("threshold", {"penalty_lambda": 3}, "penalty_lambda is 3; allowed: 0, since only joint_threshold has it"),
        (INDEL, {"penalty_lambda": 3}, "penalty_lambda is 3; allowed: 0, since only joint_threshold has it"),
        (JOINT, {"penalty_lambda": -1}, "penalty_lambda is -1; allowed: a number from 0.0 to 100.0"),
        (JOINT, {"editing_threshold": 2}, "editing_threshold is 2; allowed: a number from 0.0 to 1.0"),
        (JOINT, {"editing_threshold": None}, "editing_threshold is None; allowed: a number from 0.0 to 1.0"),
        (JOINT, {"max_post_steps": 0.5}, "max_post_steps is 0.5; allowed: an integer from 0 to 1024"),
        (
            JOINT,
            {"editing_threshold": 0.5, "edit_threshold": 0.5},
            "edit_threshold is there twice, the second time as edit_threshold; once is enough",
        ),
        (
            JOINT,
            {"num_inference_steps": 8},
            "num_inference_steps is 8; allowed: 32, the block size, since only threshold and levenshtein have steps",
        ),
        ("threshold", {"steps_per_block": 33}, "steps_per_block is 33; allowed: an integer from 1 to 32"),
        (
            "threshold",
            {"editing_threshold": 0.5},
            "editing_threshold is 0.5; allowed: null, since only joint_threshold and levenshtein edit",
        ),
        (JOINT, {"eos_early_stop": "yes"}, "eos_early_stop is 'yes'; allowed: true or false"),
        ("threshold", {"eos_early_stop": 1}, "eos_early_stop is 1; allowed: true or false"),
        (
            "threshold",
            {"gen_length": 512},
            "gen_length is 512; the request's max_new_tokens (max_tokens of the OpenAI endpoints) says that",
        ),
        (
            "threshold",
            {"temperature": 0.5},
            "temperature is 0.5; it belongs among the request's sampling parameters",
        ),
        ("threshold", {"mask_id": 156895}, "mask_id is 156895; the checkpoint says that; leave it out"),
        (
            "threshold",
            {"cache": "dual"},
            "cache is 'dual'; allowed: 'prefix', since the KV of finished blocks is always kept",
        ),
        (
            "threshold",
            {"low_threshold": 0.6},
            "low_threshold is 0.6; that is a decode of dInfer's which is not here; leave it out",
        ),
        ("threshold", {"return_step_maps": 1}, "return_step_maps is 1; allowed: true or false"),
    ],
)
def test_keys_of_other_programs_that_ask_for_more_are_refused(
    algorithm: str, mapping: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError) as error:
        DecodeConfig.defaults(T, algorithm, indel=True).replaced(mapping, "file")
    assert str(error.value) == f"file: {message}"


def test_every_foreign_key_that_means_a_parameter_names_one_that_exists() -> None:
    parameters = {p.name for each in config.ALGORITHMS.values() for p in each}
    assert {foreign.ours for foreign in config.FOREIGN.values()} - {None} <= parameters
    assert {"return_step_maps", "editing_threshold", "penalty_lambda"} < config.KEYS


def test_a_mode_names_values_and_single_ones_go_before_it(base: DecodeConfig) -> None:
    editing = base.replaced({"algorithm": "joint_threshold", "mode": "speed"})
    assert (editing.threshold, editing.edit_threshold) == (0.5, 0.0)
    quick = base.replaced({"threshold": 0.6, "mode": "speed", "algorithm": "joint_threshold"})
    assert (quick.threshold, quick.edit_threshold) == (0.6, 0.0)


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        (
            {"mode": "speed"},
            "custom_params: unknown key 'mode'; allowed: threshold, steps, early_exit, max_nfe, live_blocks, "
            "next_block_share, trace, stream_mode, algorithm",
        ),
        (
            {"algorithm": "mbe2"},
            "custom_params: algorithm is 'mbe2'; allowed: threshold, joint_threshold, levenshtein, mbe",
        ),
        ({"live_blocks": 5}, "custom_params: live_blocks is 5; allowed: an integer from 1 to 4"),
        ({"max_nfe": -1}, "custom_params: max_nfe is -1; allowed: an integer from 0 to 2147483647"),
        ({"early_exit": 0}, "custom_params: early_exit is 0; allowed: true or false"),
        (
            {"algorithm": "mbe", "window": 9},
            "custom_params: window is 9; allowed: an integer from 1 to 4",
        ),
        (
            {"algorithm": "levenshtein"},
            "custom_params: decode algorithm is 'levenshtein', for which the checkpoint's config.json must have "
            "delete_token_id and split_token_id; allowed: threshold, joint_threshold, mbe",
        ),
        (
            {"algorithm": "joint_threshold", "mode": "best"},
            "custom_params: mode is 'best'; allowed: quality, speed",
        ),
        (
            {"algorithm": "joint_threshold", "edit_threshold": 1.5},
            "custom_params: edit_threshold is 1.5; allowed: a number from 0.0 to 1.0",
        ),
    ],
)
def test_wrong_algorithms_and_modes_are_refused(base: DecodeConfig, mapping: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        base.replaced(mapping)
    assert str(error.value) == message


def test_unknown_flag_names_the_allowed_ones() -> None:
    with pytest.raises(ConfigError, match="--dllm-algorithm is 'Joint'; allowed: Threshold, LowConfidence, Tok"):
        config.algorithm_of_flag("Joint")


def test_every_flag_means_a_known_algorithm() -> None:
    assert set(config.FLAGS.values()) == set(config.NAMES)


def test_every_decode_rule_has_parameters_and_the_other_way_round() -> None:
    from sglang_llada import decode

    assert set(decode.ALGORITHMS) == {*config.ALGORITHMS, config.RUN}


def test_sampling_is_in_a_steps_rows_and_keeps_none_from_being_launched_ahead(base: DecodeConfig) -> None:
    drawn = dataclasses.replace(base, sampling=config.Sampling(1.0, 50, 0.9, 0.0, 7))
    assert base.plain and drawn.plain
    for more in ({"trace": True}, {"report": config.Report()}, {"stream_mode": "denoise"}):
        assert not dataclasses.replace(drawn, **more).plain
