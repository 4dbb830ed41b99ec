"""The two entry points that the host calls: register() in every process of a server, activate() to choose a platform.

The host swallows exceptions of plugins and goes on without them. Nobody may run its stock code while believing
otherwise, so register() turns every exception into a SystemExit, and this module imports next to nothing by itself.
"""

from __future__ import annotations

import logging
import os

from sglang_llada.config import read_mode
from sglang_llada.errors import ConfigError


def activate() -> str | None:
    """Platform entry point: the class path of our CPU platform, or None to leave the choice to the host.

    Called on first use of the host's current_platform, possibly with the host half imported: imports nothing of it.
    None on a host that fits no table, too: our platform needs repairs of the host, which are not put in place there.
    Such a host may end for want of a device before it reads a model, so what differs is said here.
    """
    from sglang_llada.accelerator import activate_platform
    from sglang_llada.host.seam import check

    platform = activate_platform()
    if platform is not None and not check.fits():
        logging.getLogger(__name__).warning("%s", check.mismatch())
        return None
    return platform


def register() -> None:
    """General entry point: put every hook of the environment's mode in place. Calling it again does nothing."""
    try:
        from sglang_llada.host.seam.install import install

        install(read_mode(os.environ))
    except ConfigError as error:
        raise SystemExit(f"sglang-llada: {error}") from None
    except Exception as error:
        raise SystemExit(f"sglang-llada: cannot start: {type(error).__name__}: {error}") from error
