"""What the manager tells a worker to serve."""

import json
from dataclasses import asdict, dataclass
from typing import Self

from modelfleet.bundle.bundle import Bundle, BundleFile
from modelfleet.bundle.manifest import Manifest


@dataclass(frozen=True, slots=True, order=True)
class VersionKey:
    """A model version's name and number; written `name@number`."""

    model: str
    model_version: int

    def __str__(self) -> str:
        return f"{self.model}@{self.model_version}"


@dataclass(frozen=True, slots=True)
class AssignedVersion:
    """A version to have loaded."""

    key: VersionKey
    bundle: Bundle


@dataclass(frozen=True, slots=True)
class WeightedVersion:
    """A share of an alias."""

    model_version: int
    weight: int


@dataclass(frozen=True, slots=True)
class Route:
    """Where an alias points."""

    model: str
    alias: str
    targets: tuple[WeightedVersion, ...]


@dataclass(frozen=True, slots=True)
class Assignment:
    """The whole of what a worker should serve. `revision` grows with each change."""

    revision: int
    versions: tuple[AssignedVersion, ...]
    routes: tuple[Route, ...]

    def to_json(self) -> str:
        """Return what `from_json` reads; a worker keeps it on disk to start without a manager."""
        return json.dumps(
            {
                "revision": self.revision,
                "versions": [
                    {
                        **asdict(version.key),
                        "manifest": version.bundle.manifest.to_json(),
                        "files": [asdict(file) for file in version.bundle.files],
                    }
                    for version in self.versions
                ],
                "routes": [asdict(route) for route in self.routes],
            }
        )

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what `to_json` wrote. Raises InvalidBundleError, ValueError, KeyError or TypeError for anything else."""
        values = json.loads(text)
        return cls(
            revision=values["revision"],
            versions=tuple(
                AssignedVersion(
                    VersionKey(version["model"], version["model_version"]),
                    Bundle(
                        tuple(BundleFile(**file) for file in version["files"]), Manifest.from_json(version["manifest"])
                    ),
                )
                for version in values["versions"]
            ),
            routes=tuple(
                Route(route["model"], route["alias"], tuple(WeightedVersion(**target) for target in route["targets"]))
                for route in values["routes"]
            ),
        )
