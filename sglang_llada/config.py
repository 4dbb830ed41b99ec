"""Facts of a run that a user may set: the mode, and how blocks are decoded.

The only reader of user mappings (the YAML file of --dllm-algorithm-config, and custom_params of a request). Every
default and every range stands here once; an unknown key or a value out of range is a ConfigError that names both the
value and what is allowed.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from sglang_llada.errors import ConfigError

MODE_VARIABLE = "SGLANG_LLADA"
REPLAY_VARIABLE = "SGLANG_LLADA_REPLAY"  # graphs on the CPU, for tests
AHEAD_VARIABLE = "SGLANG_LLADA_AHEAD"  # whether steps are launched before the one before them is read
COMPILE_VARIABLE = "SGLANG_LLADA_COMPILE"  # whether kernels are compiled while weights are loaded


class Mode(enum.Enum):
    """Whether our scheduler serves LLaDA2 models (ON) or the host's own code does (OFF), for comparison."""

    ON = "on"
    OFF = "off"


@dataclass(frozen=True, slots=True)
class Parameter:
    """One value that a decode algorithm takes; a number is allowed if low <= value <= high.

    Attributes:
        kind: a type, or the names that are allowed.
        default: None means the block size.
        high: None means the block size.
    """

    name: str
    kind: type[int] | type[float] | type[bool] | tuple[str, ...]
    default: float | int | str | None
    low: float | int
    high: float | int | None
    help: str


MOST_WINDOW = MOST_LIVE_BLOCKS = 4
FOR_ALL = (
    Parameter("max_nfe", int, 0, 0, 2**31 - 1, "decode steps after which a request ends as it is; 0: no bound"),
    Parameter("live_blocks", int, 1, 1, MOST_LIVE_BLOCKS, "blocks that may be decoded at once"),
    Parameter("next_block_share", float, 0.5, 0.0, 1.0, "share of open positions below which the next one begins"),
    Parameter("trace", bool, False, 0, 1, "report the step and the probability that decided each token"),
    Parameter(
        "stream_mode",
        ("committed", "denoise"),
        "committed",
        0,
        1,
        "with denoise, also show what stands after each step",
    ),
)

ALGORITHMS: dict[str, tuple[Parameter, ...]] = {
    "threshold": (
        Parameter("threshold", float, 0.95, 0.0, 1.0, "keep every token whose probability is above this"),
        Parameter("steps", int, None, 1, None, "most denoise steps of a block"),
        Parameter("early_exit", bool, True, 0, 1, "end as soon as nothing is open before a stop token"),
        *FOR_ALL,
    ),
    "joint_threshold": (
        Parameter("threshold", float, 0.7, 0.0, 1.0, "keep every token whose probability is above this"),
        Parameter("edit_threshold", float, 0.5, 0.0, 1.0, "replace a token by one whose probability is above this"),
        Parameter("max_post_edit_steps", int, 16, 0, 1024, "most steps that edit a block with nothing open"),
        Parameter(
            "window", int, 1, 1, MOST_WINDOW, "blocks that may be edited: the one being decoded and those before"
        ),
        Parameter("penalty_lambda", float, 0.0, 0.0, 100.0, "what the logit of the token to the left is lowered by"),
        *FOR_ALL,
    ),
    "levenshtein": (
        Parameter("threshold", float, 0.5, 0.0, 1.0, "keep every token whose probability is above this"),
        Parameter("edit_threshold", float, 0.0, 0.0, 1.0, "replace a token by one whose probability is above this"),
        Parameter("steps", int, None, 1, None, "steps over which a block's first holes are scheduled"),
        Parameter("max_post_edit_steps", int, 16, 0, 1024, "most steps that edit a block without original holes"),
        Parameter("cumulative_budget", bool, False, 0, 1, "count post-edit steps over the whole block, never again"),
        *FOR_ALL,
    ),
}

SHOWN = {"trace", "stream_mode"}  # parameters that change what is said of an answer, and not the answer

# Named values of LLaDA2.1; what stands beside the mode in a mapping goes before the mode's.
MODES: dict[str, dict[str, dict[str, float]]] = {
    "joint_threshold": {
        "quality": {"threshold": 0.7, "edit_threshold": 0.5},
        "speed": {"threshold": 0.5, "edit_threshold": 0.0},
    },
}

# Algorithms with other values than their recommended ones, under names of their own.
VARIANTS: dict[str, tuple[str, dict[str, int]]] = {"mbe": ("joint_threshold", {"window": 2})}
NAMES = (*ALGORITHMS, *VARIANTS)

NEED_INDEL = {"levenshtein"}  # DELETE and SPLIT, which only some checkpoints have

# What --dllm-algorithm accepts: of each algorithm our own name, then the host's for the same rule.
FLAGS: dict[str, str] = {
    "Threshold": "threshold",
    "LowConfidence": "threshold",
    "TokenEditing": "joint_threshold",
    "JointThreshold": "joint_threshold",
    "MultiBlockEditing": "mbe",
    "Levenshtein": "levenshtein",
    "JointThresholdInDel": "levenshtein",
}


@dataclass(frozen=True, slots=True)
class Foreign:
    """A key of another program's configuration.

    Attributes:
        instead: what is allowed, or what to use, after the key and its value; it may name {block_size}.
        same: values that change nothing here; None: the block size.
        ours: the parameter that is the same thing, where an algorithm has it.
    """

    instead: str
    same: tuple[Any, ...] | None = ()
    ours: str | None = None


YES_OR_NO = (True, False)
BLOCK = Foreign("allowed: {block_size}, the checkpoint's block size", None)
STEPS = Foreign("allowed: {block_size}, the block size, since only threshold and levenshtein have steps", None, "steps")
ONE = Foreign("allowed: 1; how many tokens a step takes at least follows from steps", (1,))
EARLY_STOP = Foreign("allowed: true or false", YES_OR_NO, "early_exit")
OF_CHECKPOINT = Foreign("the checkpoint says that; leave it out", (None,))
LENGTH = Foreign("the request's max_new_tokens (max_tokens of the OpenAI endpoints) says that")
SAMPLED = Foreign("it belongs among the request's sampling parameters", (None,))
OF_DINFER = Foreign("that is a decode of dInfer's which is not here; leave it out", (0, False))

# Of SGLang (first), of the generate() of LLaDA2's model cards, of diffusers' LLaDA2Pipeline, of dInfer and of LLaDA.
FOREIGN: dict[str, Foreign] = {
    "block_size": BLOCK,
    "penalty_lambda": Foreign("allowed: 0, since only joint_threshold has it", (0,), "penalty_lambda"),
    "vectorized_decoding": Foreign("allowed: true or false", YES_OR_NO),
    "capture_input_preparation": Foreign("allowed: true or false", YES_OR_NO),
    "return_step_maps": Foreign("allowed: true or false", (), "trace"),
    "block_length": BLOCK,
    "steps": STEPS,
    "num_inference_steps": STEPS,
    "steps_per_block": STEPS,
    "editing_threshold": Foreign(
        "allowed: null, since only joint_threshold and levenshtein edit", (None,), "edit_threshold"
    ),
    "max_post_steps": Foreign(
        "allowed: 0, since only joint_threshold and levenshtein edit", (0,), "max_post_edit_steps"
    ),
    "minimal_topk": ONE,
    "num_to_transfer": ONE,
    "eos_early_stop": EARLY_STOP,
    "early_stop": EARLY_STOP,
    "gen_length": LENGTH,
    "gen_len": LENGTH,
    "max_length": Foreign("--context-length, and the request's max_new_tokens, say that"),
    "temperature": SAMPLED,
    "top_p": SAMPLED,
    "top_k": SAMPLED,
    "sampling_method": Foreign(
        "temperature says that: 0 is greedy, above it tokens are drawn", ("auto", "multinomial")
    ),
    "mask_id": OF_CHECKPOINT,
    "mask_token_id": OF_CHECKPOINT,
    "eos_id": Foreign("the checkpoint says that; further ones are the request's stop_token_ids", (None,)),
    "eos_token_id": Foreign("the checkpoint says that; further ones are the request's stop_token_ids", (None,)),
    "use_cache": Foreign("allowed: true, since the KV of finished blocks is always kept", (True,)),
    "cache": Foreign("allowed: 'prefix', since the KV of finished blocks is always kept", ("prefix",)),
    "use_bd": Foreign("allowed: true, since the model decodes by blocks", (True,)),
    "parallel_decoding": Foreign("allowed: 'threshold'; other rules are the values of algorithm", ("threshold",)),
    "enable_torch_compile": Foreign("allowed: true or false; --enable-torch-compile does it", YES_OR_NO),
    "use_credit": OF_DINFER,
    "low_threshold": OF_DINFER,
    "cont_weight": OF_DINFER,
    "prefix_look": OF_DINFER,
    "after_look": OF_DINFER,
    "warmup_steps": OF_DINFER,
    "remasking": Foreign("allowed: 'low_confidence'", ("low_confidence",)),
    "cfg_scale": Foreign("allowed: 0, since LLaDA2 is not guided", (0,)),
}
# Of custom_params, what is no parameter of a decode: the answer as far as it is given, and the tokens whose
# probabilities are read at its open positions.
CANVAS, CHOICES = "canvas", "choices"
# All that changes how a request is decoded.
KEYS = (
    {"algorithm", "mode"}
    | {p.name for parameters in ALGORITHMS.values() for p in parameters}
    | {key for key, foreign in FOREIGN.items() if foreign.ours}
)
DEFAULT_ALGORITHM = "threshold"
RUN = "run"  # how structured output is decoded, whatever the request's algorithm
RELEASE = re.compile(r"llada[-_.]?2\.(\d)", re.IGNORECASE)

# The host's own default for diffusion models is 1, which serves one request at a time.
DEFAULT_MAX_RUNNING_REQUESTS = 64


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a request's tokens are drawn; the host has checked the values.

    Attributes:
        temperature: above 0.
        top_k, top_p, min_p: see decode/sampling.py; the vocabulary or more, 1 and 0 cut nothing.
        seed: 64 bits, signed.
    """

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int


@dataclass(frozen=True, slots=True)
class Report:
    """Log-probabilities that a request wants of each token: the `top` largest, and those of `ids`.

    Attributes:
        original: of the logits as the network gives them, where otherwise they are of what tokens are chosen from.
        prompt_from: of the prompt's tokens too, from this position on; None: not.
        only_open: of the prompt's tokens of a read, only of those that are open in its canvas.
    """

    top: int = 0
    ids: tuple[int, ...] = ()
    original: bool = False
    prompt_from: int | None = None
    only_open: bool = False


@dataclass(frozen=True, slots=True)
class DecodeConfig:
    """How the blocks of a request are decoded; made by defaults() and replaced(), which check every value.

    Attributes:
        algorithm: a key of ALGORITHMS, or RUN.
        block_size: positions of a block; a fact of the checkpoint, and the bound of steps.
        threshold: a token is kept when its probability is above (strictly) this.
        steps: most denoise steps that a block may take.
        edit_threshold: a decided token is replaced by another whose probability is above (strictly) this.
        max_post_edit_steps: most steps that may edit a block with nothing open.
        penalty_lambda: what the logit of the token to the left of a position, in its block, is lowered by there.
        early_exit: whether an answer is complete when nothing is open before a stop token, or only with its block.
        max_nfe: decode steps after which a request ends with the tokens before its first open position; 0: no bound.
        cumulative_budget: whether those are counted over the whole block, though holes may have come back.
        window: blocks that may be edited at once: the one being decoded and those before it.
        live_blocks: blocks that may be decoded at once.
        next_block_share: the next of them begins when fewer positions than this share of the last one are open.
        trace: whether to report the step of each token and its probability then.
        stream_mode: "denoise" to report after each step what stands behind the committed tokens, too.
        indel: whether the checkpoint has DELETE and SPLIT.
        sampling: how tokens are drawn; None: the best one, greedily.
        report: the log-probabilities to report; None: none.
    """

    algorithm: str
    block_size: int
    threshold: float
    steps: int = 1
    edit_threshold: float = 1.0
    max_post_edit_steps: int = 0
    penalty_lambda: float = 0.0
    cumulative_budget: bool = False
    early_exit: bool = True
    max_nfe: int = 0
    window: int = 1
    live_blocks: int = 1
    next_block_share: float = 0.5
    trace: bool = False
    stream_mode: str = "committed"
    indel: bool = False
    sampling: Sampling | None = None
    report: Report | None = None

    @classmethod
    def defaults(cls, block_size: int, algorithm: str = DEFAULT_ALGORITHM, *, indel: bool = False) -> DecodeConfig:
        """What an algorithm does when nobody sets anything."""
        if algorithm not in NAMES:
            raise ConfigError(f"decode algorithm is {algorithm!r}; allowed: {', '.join(NAMES)}")
        if algorithm in NEED_INDEL and not indel:
            raise ConfigError(
                f"decode algorithm is {algorithm!r}, for which the checkpoint's config.json must have delete_token_id "
                f"and split_token_id; allowed: {', '.join(name for name in NAMES if name not in NEED_INDEL)}"
            )
        base, changes = VARIANTS.get(algorithm, (algorithm, {}))
        values: dict[str, Any] = {p.name: block_size if p.default is None else p.default for p in ALGORITHMS[base]}
        return cls(base, block_size, indel=indel, **(values | changes))

    @property
    def edits(self) -> bool:
        """Whether decided tokens may change until their block is done."""
        return self.algorithm in ("joint_threshold", "levenshtein")

    @property
    def reopens(self) -> bool:
        """Whether decided tokens may become open again."""
        return self.algorithm == "levenshtein"

    @property
    def noted(self) -> bool:
        """Whether something is kept on each token beside its id."""
        return self.trace or self.report is not None

    @property
    def plain(self) -> bool:
        """Whether a step's rows say all that is asked for here."""
        return self.report is None and not self.trace and self.stream_mode == "committed"

    @property
    def most_steps(self) -> int:
        """The bound on a block's steps that the algorithm's docstring proves."""
        if self.algorithm == RUN:
            return self.block_size
        if not self.edits:
            return self.steps
        return self.block_size + self.max_post_edit_steps + (1 if self.reopens else 0)

    def replaced(self, mapping: Mapping[str, Any] | None, where: str = "custom_params") -> DecodeConfig:
        """This with a user's mapping laid over it; ConfigError, beginning with `where`, if the mapping is wrong.

        None is an empty mapping, as an empty YAML file or a request without options gives it.
        """
        if mapping is not None and not isinstance(mapping, Mapping):
            raise ConfigError(f"{where}: got {mapping!r}; needed is a mapping of names to values")
        if not mapping:
            return self
        base = self
        if "algorithm" in mapping:
            algorithm = one_of("algorithm", mapping["algorithm"], NAMES, where)
            try:
                base = self._switched(algorithm)
            except ConfigError as error:
                raise ConfigError(f"{where}: {error}") from None
        parameters, modes = {p.name: p for p in ALGORITHMS[base.algorithm]}, MODES.get(base.algorithm, {})
        allowed = [*parameters, "algorithm", *(["mode"] if modes else [])]
        mapping = translated(mapping, parameters, self.block_size, where)
        unknown = [key for key in mapping if key not in allowed]
        if unknown:
            names = ", ".join(repr(key) for key in unknown)
            raise ConfigError(f"{where}: unknown key {names}; allowed: {', '.join(allowed)}")
        named = modes[one_of("mode", mapping["mode"], modes, where)] if "mode" in mapping else {}
        values: dict[str, Any] = {
            name: checked(value, parameters[name], self.block_size, where)
            for name, value in {**named, **mapping}.items()
            if name in parameters
        }
        return replace(base, **values)

    @property
    def from_left_to_right(self) -> DecodeConfig:
        """This for structured output: decided in runs above the same threshold, which are final at once."""
        return replace(self, algorithm=RUN, early_exit=True, window=1, live_blocks=1)

    def _switched(self, algorithm: str) -> DecodeConfig:
        return (
            self if algorithm == self.algorithm else DecodeConfig.defaults(self.block_size, algorithm, indel=self.indel)
        )


def read_mode(environ: Mapping[str, str]) -> Mode:
    """The mode that the environment asks for; unset or empty means on."""
    value = environ.get(MODE_VARIABLE) or Mode.ON.value
    try:
        return Mode(value)
    except ValueError:
        allowed = " or ".join(repr(mode.value) for mode in Mode)
        raise ConfigError(f"{MODE_VARIABLE} is {value!r}; allowed: {allowed}") from None


def read_switch(environ: Mapping[str, str], variable: str, *, default: bool) -> bool:
    """What the environment says of a variable that is '0' or '1'; the default where it is unset or empty."""
    value = environ.get(variable) or str(int(default))
    if value not in ("0", "1"):
        raise ConfigError(f"{variable} is {value!r}; allowed: '0' or '1'")
    return value == "1"


def flag_of_checkpoint(name: str, *, indel: bool) -> str:
    """The --dllm-algorithm of a checkpoint when nobody says: by what it declares, then by its name, then as 2.0."""
    releases = RELEASE.findall(name)
    edits = bool(releases) and int(releases[-1]) >= 1
    return flag_of("levenshtein" if indel else "joint_threshold" if edits else DEFAULT_ALGORITHM)


def flag_of(algorithm: str) -> str:
    """Our own value of --dllm-algorithm for an algorithm."""
    return next(flag for flag in FLAGS if FLAGS[flag] == algorithm)


def algorithm_of_flag(flag: str) -> str:
    """The algorithm that a value of --dllm-algorithm means."""
    if flag not in FLAGS:
        raise ConfigError(f"--dllm-algorithm is {flag!r}; allowed: {', '.join(FLAGS)}")
    return FLAGS[flag]


def translated(
    mapping: Mapping[str, Any], parameters: Mapping[str, Parameter], block_size: int, where: str
) -> dict[str, Any]:
    """The mapping in our own keys; ConfigError if one of FOREIGN asks for what is not done here."""
    found: dict[str, Any] = {}
    for key, value in mapping.items():
        name, foreign = key, FOREIGN.get(key)
        if key in parameters or foreign is None:
            pass
        elif foreign.ours is not None and foreign.ours in parameters:
            name = foreign.ours
            value = checked(value, replace(parameters[name], name=key), block_size, where)
        elif value in ((block_size,) if foreign.same is None else foreign.same):
            continue
        else:
            raise ConfigError(f"{where}: {key} is {value!r}; {foreign.instead.format(block_size=block_size)}")
        if name in found:
            raise ConfigError(f"{where}: {name} is there twice, the second time as {key}; once is enough")
        found[name] = value
    return found


def one_of(key: str, value: Any, allowed: Collection[str], where: str) -> str:
    """The value if it names one of the allowed, or ConfigError."""
    if not isinstance(value, str) or value not in allowed:
        raise ConfigError(f"{where}: {key} is {value!r}; allowed: {', '.join(allowed)}")
    return value


def checked(value: Any, parameter: Parameter, block_size: int, where: str) -> float | int | bool | str:
    """The value as the parameter's kind, or ConfigError. An integer is a fine float; a bool is no number."""
    if isinstance(parameter.kind, tuple):
        return one_of(parameter.name, value, parameter.kind, where)
    if parameter.kind is bool:
        if not isinstance(value, bool):
            raise ConfigError(f"{where}: {parameter.name} is {value!r}; allowed: true or false")
        return value
    high = block_size if parameter.high is None else parameter.high
    accepted = (int, float) if parameter.kind is float else (int,)
    # NaN fails the comparison.
    if isinstance(value, bool) or not isinstance(value, accepted) or not parameter.low <= value <= high:
        noun = "a number" if parameter.kind is float else "an integer"
        raise ConfigError(f"{where}: {parameter.name} is {value!r}; allowed: {noun} from {parameter.low} to {high}")
    return parameter.kind(value)
