"""The host's HTTP app for servers with several HTTP processes, which load no plugins by themselves."""

from sglang.srt.plugins import load_plugins

load_plugins()

from sglang.srt.entrypoints import http_server  # noqa: E402  (it looks up what the plugins replace)

from sglang_llada.host.requests.draining import Drain  # noqa: E402

app = Drain(http_server.app, http_server.app)
