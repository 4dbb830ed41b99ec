"""What a table of seams is made of: one row for each host name, one table for each release.

Tables name parameters, not behaviour; behaviour is what the tests under tests/host are for.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

# Canonical signatures of what is no function.
CLASS = "class"
VALUE = "value"
MISSING = "missing"  # of a name that a release does not have, and that we do without there


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
            VALUE or MISSING.
        why: what we need it for.
        until: what would make it unnecessary.
    """

    target: str
    kind: Kind
    signature: str
    why: str
    until: str


@dataclass(frozen=True, slots=True)
class Release:
    """A release of the host and what we know of its names."""

    version: str
    seams: tuple[Seam, ...]

    def but(self, version: str, signatures: Mapping[str, str], more: tuple[Seam, ...] = ()) -> Release:
        """Another release: as this one, but for the signatures of some targets and `more` that only it needs.

        Raises:
            ValueError: this release has no such target, or has the same signature.
        """
        own = {seam.target: seam.signature for seam in self.seams}
        idle = [target for target, signature in signatures.items() if own.get(target, signature) == signature]
        if idle:
            raise ValueError(f"{version} does not differ from {self.version} in {', '.join(idle)}")
        seams = tuple(replace(seam, signature=signatures.get(seam.target, seam.signature)) for seam in self.seams)
        return Release(version, seams + more)


def fields(owner: str, names: str, why: str, until: str) -> Iterator[Seam]:
    """Rows of attributes of a class, or names of a module, that serve one purpose; separated by spaces."""
    for name in names.split():
        yield Seam(f"{owner}.{name}" if ":" in owner else f"{owner}:{name}", Kind.USE, VALUE, why, until)
