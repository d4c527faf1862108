"""A bundle read from a directory: its manifest, the files worth shipping, their hashes."""

import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

import yaml

from modelfleet.bundle.bundle import GOLDEN_FILE, Bundle, BundleFile, check_path, hash_file
from modelfleet.bundle.golden import read_golden
from modelfleet.bundle.graph import check_graph, outputs
from modelfleet.bundle.infer import infer_manifest
from modelfleet.bundle.manifest import MANIFEST_FILE, Manifest, Task
from modelfleet.bundle.task_outputs import FORMS, check_output
from modelfleet.runtime.errors import InvalidBundleError

# What else a model's folder holds: weights for other runtimes, and other graphs with their data.
_OTHER_WEIGHTS = frozenset(
    {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".ot", ".tflite", ".mlmodel", ".pkl"}
)
_OTHER_GRAPHS = (".onnx", ".onnx_data", ".onnx.data")
_SKIPPED_FOLDERS = frozenset({"__pycache__", "openvino", "coreml"})


def open_directory(root: Path, *, with_golden: bool = True) -> tuple[Bundle, Mapping[str, Path]]:
    """
    Read the bundle in a directory. Returns it, and where each of its files lies.

    `modelfleet.yaml` is its manifest; fields that it leaves out are inferred from the other files. Hidden files, that
    manifest, and the weights of other runtimes and graphs are left out. Symbolic links to files are followed. Raises
    InvalidBundleError when the directory holds no model, a file cannot be read, the graph is corrupt or names data
    outside the bundle, or the golden examples are unreadable; they are left out unless `with_golden`.
    """
    if not root.is_dir():
        raise InvalidBundleError(f"{root} is no directory. Name the folder that holds the model.", field="path")
    manifest = _manifest(root)
    check_path(manifest.model)
    graph = root / manifest.model
    if not graph.is_file():
        raise InvalidBundleError(
            f"The manifest's model is {manifest.model!r}, which is no file in {root}. Correct {MANIFEST_FILE}.",
            field="model",
        )
    needed = check_graph(graph, root) | {manifest.model}
    if manifest.task in FORMS:
        _check_output(manifest, graph)
    paths = {path: root / path for path in _files(root) if path in needed or _is_worth_shipping(path, manifest)}
    if not with_golden:
        paths.pop(GOLDEN_FILE, None)
    elif GOLDEN_FILE in paths:
        read_golden(paths[GOLDEN_FILE])
    with ThreadPoolExecutor(os.cpu_count()) as threads:  # hashing releases the interpreter's lock
        hashed = threads.map(_hashed, paths, paths.values())
        bundle = Bundle(files=tuple(hashed), manifest=manifest)
    return bundle, paths


def _check_output(manifest: Manifest, graph: Path) -> None:
    found = outputs(graph)
    name = manifest.output or next(iter(found), "")
    if name not in found:
        raise InvalidBundleError(
            f"The manifest's output is {name!r}; the graph has {', '.join(found)}. Correct it.", field="output"
        )
    dtype, shape = found[name]
    if shape is not None:
        check_output(manifest, name, dtype, shape)


def _manifest(root: Path) -> Manifest:
    path = root / MANIFEST_FILE
    try:
        given = yaml.safe_load(path.read_bytes()) or {}
    except FileNotFoundError:
        given = {}
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise InvalidBundleError(f"{path} cannot be read: {error}. Correct it.", field=MANIFEST_FILE) from error
    if not isinstance(given, dict):
        raise InvalidBundleError(f"{path} has no fields. Write lines such as `task: embed`.", field=MANIFEST_FILE)
    return infer_manifest(root, given)


def _files(root: Path) -> Iterator[str]:
    # A link to a folder may lead back up, so folders are entered only when they are real.
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in _SKIPPED_FOLDERS]
        for name in names:
            yield (Path(folder) / name).relative_to(root).as_posix()


def _is_worth_shipping(path: str, manifest: Manifest) -> bool:
    name = PurePosixPath(path).name
    if name.startswith(".") or path == MANIFEST_FILE:
        return False
    if manifest.task is not Task.GENERATE and name.endswith(_OTHER_GRAPHS):
        return False  # a `generate` model may have several, which genai_config.json names
    return PurePosixPath(name).suffix not in _OTHER_WEIGHTS


def _hashed(path: str, source: Path) -> BundleFile:
    if not source.is_file():
        raise InvalidBundleError(f"{path} is no file, or a link to none. Correct or remove it.", field="files")
    try:
        sha256, size = hash_file(source)
    except OSError as error:
        raise InvalidBundleError(f"{path} cannot be read: {error.strerror}.", field="files") from error
    return BundleFile(path, sha256, size)
