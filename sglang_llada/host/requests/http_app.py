"""The host's HTTP app for servers with several HTTP processes, which load no plugins by themselves."""

from sglang.srt.plugins import load_plugins

load_plugins()

from sglang.srt.entrypoints.http_server import app  # noqa: E402  (it looks up what the plugins replace)

__all__ = ["app"]
