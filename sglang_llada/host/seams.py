"""Every host name that this package hooks, replaces or relies on, as a table that is checked before anything is hooked.

The check reads the host's source files and imports none of them: a release that renamed a method or changed its
parameters is reported in a fraction of a second, in one message that lists every difference. It compares names and
parameters, not behaviour; behaviour is what the tests under tests/host are for.
"""

from __future__ import annotations

import ast
import enum
import importlib.metadata
import importlib.util
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from sglang_llada.errors import HostMismatch

RELEASE = "0.5.23"

# Canonical signatures of what is no function.
CLASS = "class"
VALUE = "value"


class Kind(enum.Enum):
    """What we do with a host name."""

    HOOK = "hook"
    REPLACE = "replace"
    USE = "use"


@dataclass(frozen=True, slots=True)
class Seam:
    """One host name.

    Attributes:
        target: "module:Qualified.name", in the module that defines it. An attribute that methods assign to self counts
            as a member of its class.
        signature: parameter names and kinds without annotations and defaults, as signature_of() writes them, or CLASS,
            or VALUE.
        why: what we need it for.
        until: what would make it unnecessary.
    """

    target: str
    kind: Kind
    signature: str
    why: str
    until: str


@dataclass(frozen=True, slots=True)
class Host:
    """An installed host: its release and the folder of its package."""

    version: str
    root: Path


OWN_SCHEDULER = "the host can choose a scheduler class by model"
CHECKPOINT_FACTS = "the host reads block size and mask id from the checkpoint"
PLUGIN_API = "never: the host's plugin interface"
LAZY_MODELS = "the host has an entry point group for models"
NAMED_ALGORITHMS = "the host has a registry of diffusion algorithms"

SEAMS: tuple[Seam, ...] = (
    # Registering
    Seam(
        "sglang.srt.plugins.hook_registry:HookRegistry.register",
        Kind.USE,
        "(cls, target, hook, hook_type, *, source)",
        "every hook and replacement below goes through it",
        PLUGIN_API,
    ),
    Seam(
        "sglang.srt.plugins.hook_registry:HookType",
        Kind.USE,
        CLASS,
        "names the ways of hooking",
        PLUGIN_API,
    ),
    Seam(
        "sglang.srt.arg_groups.resolution_hooks:register_resolution_hook",
        Kind.USE,
        "(name)",
        "wraps the steps of argument resolution",
        PLUGIN_API,
    ),
    Seam(
        "sglang.srt.platforms:current_platform",
        Kind.USE,
        VALUE,
        "tells whether our CPU platform is the active one",
        PLUGIN_API,
    ),
    # Server arguments
    Seam(
        "sglang.srt.arg_groups.serving_hook:handle_missing_default_values",
        Kind.HOOK,
        "(server_args)",
        "fills in the algorithm, the number of running requests and the page size of a LLaDA2 model",
        "the host defaults them from the model",
    ),
    Seam(
        "sglang.srt.arg_groups.model_override_base:resolving_view",
        Kind.USE,
        "(server_args)",
        "reads arguments while they are resolved",
        PLUGIN_API,
    ),
    Seam(
        "sglang.srt.arg_groups.overrides:declare_resolution",
        Kind.USE,
        "(server_args, source, **fields)",
        "sets arguments while they are resolved",
        PLUGIN_API,
    ),
    Seam(
        "sglang.srt.arg_groups.overrides:_dllm_page_size",
        Kind.USE,
        "(view)",
        "keeps the page size at the block size, which a row needs",
        "the host takes the page size of a model as given",
    ),
    Seam(
        "sglang.srt.arg_groups.fields.exec_:ExecDllm.dllm_algorithm",
        Kind.USE,
        VALUE,
        "makes attention backends and graph runners treat the model as block diffusion",
        NAMED_ALGORITHMS,
    ),
    Seam(
        "sglang.srt.arg_groups.fields.exec_:ExecDllm.dllm_algorithm_config",
        Kind.USE,
        VALUE,
        "names the YAML file of decode parameters",
        NAMED_ALGORITHMS,
    ),
    # Diffusion facts
    Seam(
        "sglang.srt.dllm.config:DllmConfig.__init__",
        Kind.USE,
        "(self, algorithm, algorithm_config, block_size, mask_id, max_running_requests, first_done_first_out_mode, "
        "requires_separate_context_encoding, capture_input_preparation, delete_token_id, split_token_id)",
        "block_size and mask_id of what it builds are set from the checkpoint",
        CHECKPOINT_FACTS,
    ),
    Seam(
        "sglang.srt.dllm.config:DllmConfig.from_server_args",
        Kind.HOOK,
        "(server_args)",
        "takes block size and mask id from a table of architecture names, wrong for every checkpoint but one",
        CHECKPOINT_FACTS,
    ),
    Seam(
        "sglang.srt.dllm.algorithm:algo_name_to_cls",
        Kind.USE,
        VALUE,
        "makes --dllm-algorithm Threshold resolve",
        NAMED_ALGORITHMS,
    ),
    Seam(
        "sglang.srt.dllm.algorithm.base:DllmAlgorithm",
        Kind.USE,
        CLASS,
        "base of the class that stands for our algorithm in the host",
        NAMED_ALGORITHMS,
    ),
    Seam(
        "sglang.srt.dllm.algorithm.base:DllmAlgorithm.supported_attention_backends",
        Kind.USE,
        VALUE,
        "keeps the host from forcing an attention backend",
        NAMED_ALGORITHMS,
    ),
    Seam(
        "sglang.srt.dllm.algorithm.base:DllmAlgorithm.run",
        Kind.USE,
        "(self, model_runner, forward_batch, algo_states)",
        "must never run under our scheduler",
        NAMED_ALGORITHMS,
    ),
    # Model class
    Seam(
        "sglang.srt.model_loader.utils:get_model_architecture",
        Kind.HOOK,
        "(model_config)",
        "registers our model class in the process that loads weights; the registry costs others seconds to import",
        LAZY_MODELS,
    ),
    Seam(
        "sglang.srt.models.registry:_ModelRegistry.register",
        Kind.USE,
        "(self, package_name, overwrite, strict)",
        "puts our model class in the place of the host's",
        LAZY_MODELS,
    ),
    # Scheduler
    Seam(
        "sglang.srt.managers.scheduler:Scheduler",
        Kind.REPLACE,
        CLASS,
        "our scheduler is a subclass in its place",
        OWN_SCHEDULER,
    ),
    Seam(
        "sglang.srt.managers.scheduler:Scheduler.__init__",
        Kind.USE,
        "(self, server_args, port_args)",
        "constructed by the host's scheduler process",
        OWN_SCHEDULER,
    ),
)


def installed_host() -> Host:
    """The host that this Python would import, found without importing it."""
    spec = importlib.util.find_spec("sglang")
    if spec is None or not spec.submodule_search_locations:
        raise HostMismatch(f"sglang-llada: SGLang is not installed; install sglang=={RELEASE}")
    return Host(importlib.metadata.version("sglang"), Path(spec.submodule_search_locations[0]))


def require(table: Iterable[Seam] = SEAMS, host: Host | None = None) -> None:
    """Raise HostMismatch with every difference between the table and the host (the installed one by default)."""
    differences = check(table, host)
    if differences:
        listed = "\n".join(f"  - {difference}" for difference in differences)
        raise HostMismatch(
            f"sglang-llada: the installed SGLang is not the release that it was written for, {RELEASE}:\n{listed}\n"
            f"Install sglang=={RELEASE}, or a release of sglang-llada that supports this one."
        )


def check(table: Iterable[Seam] = SEAMS, host: Host | None = None) -> list[str]:
    """One sentence for each difference between the table and the host, the host's release first."""
    host = installed_host() if host is None else host
    differences = [difference for _, difference in compare(table, host) if difference]
    if host.version != RELEASE:
        differences.insert(0, f"release is {host.version}, expected {RELEASE}")
    return differences


def compare(table: Iterable[Seam], host: Host) -> Iterator[tuple[Seam, str | None]]:
    """Each row with what is different about it, or None."""
    trees: dict[str, ast.Module | None] = {}
    for seam in table:
        module, _, name = seam.target.partition(":")
        if module not in trees:
            trees[module] = parse(module, host.root)
        yield seam, difference(seam, trees[module], module, name)


def difference(seam: Seam, tree: ast.Module | None, module: str, name: str) -> str | None:
    """What is different about one row."""
    if tree is None:
        return f"{seam.target}: module {module} is missing"
    found = find(tree, name.split("."))
    if found is None:
        return f"{seam.target}: {name} is missing from {module}"
    signature = signature_of(found)
    if signature != seam.signature:
        return f"{seam.target}: is {signature}, expected {seam.signature}"
    return None


def parse(module: str, root: Path) -> ast.Module | None:
    """The syntax tree of a host module, None if it has no source file."""
    base = root.joinpath(*module.split(".")[1:])
    for path in (base.with_suffix(".py"), base / "__init__.py"):
        if path.is_file():
            return ast.parse(path.read_text(encoding="utf-8"))
    return None


def find(scope: ast.AST, names: list[str]) -> ast.AST | None:
    """The node that binds a dotted name; of several, the last, as at run time."""
    found = None
    for node, bound in bindings(scope):
        if names[0] == bound:
            found = node
    if found is None or len(names) == 1:
        return found
    return find(found, names[1:])


def bindings(scope: ast.AST) -> Iterator[tuple[ast.AST, str]]:
    """What a module or class binds: definitions and assignments, also inside if and try, and self.NAME of methods."""
    for node in ast.iter_child_nodes(scope):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node, node.name
            if isinstance(scope, ast.ClassDef) and not isinstance(node, ast.ClassDef):
                yield from assigned_to_self(node)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                if isinstance(target, ast.Name):
                    yield node, target.id
        elif isinstance(node, ast.If | ast.Try | ast.ExceptHandler | ast.With):
            yield from bindings(node)


def assigned_to_self(method: ast.AST) -> Iterator[tuple[ast.AST, str]]:
    """The attributes that a method assigns to self."""
    for node in ast.walk(method):
        if (
            isinstance(node, ast.Attribute)
            and isinstance(node.ctx, ast.Store)
            and isinstance(node.value, ast.Name)
            and node.value.id == "self"
        ):
            yield node, node.attr


def signature_of(node: ast.AST) -> str:
    """Canonical signature: parameter names with /, *, * and ** where Python has them; CLASS; VALUE."""
    if isinstance(node, ast.ClassDef):
        return CLASS
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return VALUE
    a = node.args
    parts = [p.arg for p in a.posonlyargs] + ["/"] * bool(a.posonlyargs) + [p.arg for p in a.args]
    if a.vararg:
        parts.append(f"*{a.vararg.arg}")
    elif a.kwonlyargs:
        parts.append("*")
    parts += [p.arg for p in a.kwonlyargs]
    if a.kwarg:
        parts.append(f"**{a.kwarg.arg}")
    prefix = "async " if isinstance(node, ast.AsyncFunctionDef) else ""
    return f"{prefix}({', '.join(parts)})"
