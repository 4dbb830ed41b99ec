"""The releases of the host that are supported, newest first. A new one is a file beside this one and a line here."""

from sglang_llada.host.seam.releases import v0_5_22, v0_5_23

RELEASES = (v0_5_23.RELEASE, v0_5_22.RELEASE)
NEWEST = RELEASES[0]
