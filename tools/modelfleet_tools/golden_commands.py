"""`modelfleet golden record | show`."""

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, TypeAlias

import numpy as np
import typer
from modelfleet.bundle.bundle import GOLDEN_FILE
from modelfleet.bundle.golden import Array, GoldenExample, read_golden

from modelfleet_tools.exit_codes import Commands
from modelfleet_tools.golden_recording import DEFAULT_QUERY, Inputs, record_golden
from modelfleet_tools.options import JsonOption
from modelfleet_tools.output import print_json, print_table, shortened, tell
from modelfleet_tools.texts import read_texts
from modelfleet_tools.up import DeviceOption

commands = typer.Typer(
    cls=Commands,
    help="Examples that every worker must reproduce before it serves the model.",
    no_args_is_help=True,
)

_Folder: TypeAlias = Annotated[
    Path, typer.Argument(metavar="DIR", exists=True, file_okay=False, help="The model's folder.")
]


@commands.command("record")
def record(
    folder: _Folder,
    *,
    text: Annotated[list[str] | None, typer.Option("--text", help="A text; repeat it for several.")] = None,
    source: Annotated[
        list[Path] | None,
        typer.Option(
            "--input",
            exists=True,
            dir_okay=False,
            help="A file with one text a line; for a `tensor` model an .npz file of one example, arrays by input name.",
        ),
    ] = None,
    query: Annotated[str, typer.Option(help="For `rerank`: the query that texts are documents for.")] = DEFAULT_QUERY,
    device: DeviceOption = "cpu",
    as_json: JsonOption = False,
) -> None:
    """
    Run a model on a few inputs and keep these with the outputs in its folder, as golden.npz.

    Without texts, a text model gets a few of ours; one that generates continues them. `push` ships the file; from then
    on no worker serves the version whose outputs differ by more than golden_tolerance in modelfleet.yaml.

    Example: modelfleet golden record .cache/samples/pii --text "My name is Ada Lovelace."
    """
    files = source or []
    tensors = {path.name: _tensors(path) for path in files if path.suffix == ".npz"}
    texts = [*(text or ()), *(line for path in files if path.suffix != ".npz" for line in read_texts(None, path))]
    if tensors and texts:
        raise typer.BadParameter("Give texts or .npz files, not both.")
    tell(f"Running {folder} …")
    examples = record_golden(folder, Inputs(texts, query, tensors), device=device)
    _print(folder / GOLDEN_FILE, examples, as_json=as_json)


@commands.command("show")
def show(folder: _Folder, *, as_json: JsonOption = False) -> None:
    """
    List the golden examples in a model's folder.

    Example: modelfleet golden show .cache/samples/pii
    """
    path = folder / GOLDEN_FILE
    _print(path, read_golden(path), as_json=as_json)


def _tensors(path: Path) -> dict[str, Array]:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            found = {name: arrays[name] for name in arrays.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise typer.BadParameter(f"{path} is no .npz file without objects: {error}.") from error
    return {name: array.astype(object) if array.dtype.kind == "U" else array for name, array in found.items()}


def _print(path: Path, examples: tuple[GoldenExample, ...], *, as_json: bool) -> None:
    described = [
        {"name": example.name, "inputs": _shapes(example.inputs), "outputs": _shapes(example.outputs)}
        for example in examples
    ]
    if as_json:
        print_json({"path": str(path), "examples": described})
        return
    rows = [(shortened(example.name), _shown(example.inputs), _shown(example.outputs)) for example in examples]
    print_table(str(path), ("example", "inputs", "outputs"), rows)


def _shapes(tensors: Mapping[str, Array]) -> dict[str, list[int]]:
    return {name: list(array.shape) for name, array in tensors.items()}


def _shown(tensors: Mapping[str, Array]) -> str:
    return ", ".join(f"{name} {shape}" for name, shape in _shapes(tensors).items())
