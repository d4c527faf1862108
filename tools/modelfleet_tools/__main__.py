"""The `modelfleet` command."""

from importlib.metadata import version
from typing import Annotated

import typer

from modelfleet_tools import (
    generate,
    golden_commands,
    manager_commands,
    pools,
    registry,
    requests,
    rollout_commands,
    samples_commands,
)
from modelfleet_tools.batch.command import batch
from modelfleet_tools.bench.command import bench
from modelfleet_tools.check import check
from modelfleet_tools.demo import demo
from modelfleet_tools.evaluate.command import evaluate
from modelfleet_tools.exit_codes import EPILOG, Commands
from modelfleet_tools.export.commands import export, verify
from modelfleet_tools.import_command import import_model
from modelfleet_tools.train.command import train
from modelfleet_tools.up import up

app = typer.Typer(
    name="modelfleet",
    cls=Commands,
    help="Serve models, and ask them: three gRPC services on this machine or elsewhere.",
    epilog=EPILOG,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,
    pretty_exceptions_show_locals=False,
)
app.command()(up)
app.command()(demo)
app.add_typer(samples_commands.commands, name="samples")
app.add_typer(golden_commands.commands, name="golden")
app.add_typer(manager_commands.commands, name="manager")
app.command()(registry.push)
app.command()(registry.models)
app.command()(registry.alias)
app.command()(registry.place)
app.command()(registry.delete)
app.add_typer(rollout_commands.commands, name="rollout")
app.add_typer(pools.commands, name="pools")
app.command()(requests.embed)
app.command()(requests.classify)
app.command()(requests.entities)
app.command()(requests.rerank)
app.command()(generate.generate)
app.command()(generate.chat)
app.command("import")(import_model)
app.command()(export)
app.command()(verify)
app.command()(train)
app.command()(batch)
app.command()(check)
app.command()(evaluate)
app.command()(bench)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"modelfleet {version('modelfleet')}")
        raise typer.Exit


@app.callback()
def _modelfleet(
    *,
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the release and end.")
    ] = False,
) -> None: ...


def main() -> None:
    """Run the command line."""
    app(prog_name="modelfleet")


if __name__ == "__main__":
    main()
