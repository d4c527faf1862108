"""Registering the model in a folder, and asking what the aliases of a model name."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from modelfleet.bundle.directory import open_directory
from modelfleet.client.answers import Pushed
from modelfleet.client.client import Client
from modelfleet.runtime.errors import ModelNotFoundError
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from modelfleet_tools.output import tell


def aliases_of(client: Client, model: str) -> Mapping[str, int]:
    """Return which version each alias of a model names; none where the model is not registered."""
    try:
        return client.get_model(model).aliases
    except ModelNotFoundError:
        return {}


def push_folder(
    client: Client, folder: Path, name: str, alias: str | None, *, pools: Sequence[str] = (), timeout_s: float
) -> Pushed:
    """Register a folder's bundle, with a bar of progress on a terminal's standard error."""
    tell(f"Reading {folder} …")
    bundle, paths = open_directory(folder)
    bar = Progress(
        TextColumn("Sending"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), console=Console(stderr=True)
    )
    bar.disable = not bar.console.is_terminal
    with bar:
        task = bar.add_task("send", total=None, visible=False)  # until it is known how much there is
        return client.push(
            bundle,
            paths,
            name,
            alias=alias or "",
            pools=pools,
            progress=lambda sent, total: bar.update(task, completed=sent, total=total, visible=total > 0),
            timeout_s=timeout_s,
        )
