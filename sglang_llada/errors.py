"""The three ways this package fails, named by who can mend it."""

from __future__ import annotations


class ConfigError(ValueError):
    """The user's to mend: a flag, a checkpoint file or a request option; the message has value and allowed ones."""


class HostMismatch(SystemExit):
    """There is no SGLang, or one that fits no table of seams, and a LLaDA2 model is to be served.

    A SystemExit, because the host swallows ordinary exceptions of plugins and would go on with its stock code.
    """


class IntegrityError(RuntimeError):
    """A bug of ours: the state that we keep contradicts itself or the host's pools."""
