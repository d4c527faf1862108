"""`modelfleet manager gc | check`: care for what the manager stores, through its own RPCs."""

from typing import Annotated

import typer
from modelfleet.client.answers import BlobReport
from rich.console import Console
from rich.progress import Progress, TextColumn

from modelfleet_tools.exit_codes import Commands, ExitCode
from modelfleet_tools.options import JsonOption, ManagerOption, open_client
from modelfleet_tools.output import print_json, print_table, tell

commands = typer.Typer(
    cls=Commands, help="Care for what the manager stores.", no_args_is_help=True, rich_markup_mode=None
)

_PartTimeoutOption = Annotated[
    float, typer.Option("--timeout", metavar="SECONDS", min=0.001, help="Longest wait for each answer.")
]


@commands.command()
def gc(
    *,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Delete nothing; only tell what would be.")] = False,
    grace: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS",
            min=0,
            help="Spare blobs used since then, instead of the manager's own setting. Pushes that take longer may fail "
            "and have to be made again.",
        ),
    ] = None,
    manager: ManagerOption = None,
    timeout: _PartTimeoutOption = 3600,
    as_json: JsonOption = False,
) -> None:
    """
    Delete the blobs that no model version has. The manager does so by itself at intervals.

    Examples: modelfleet manager gc --dry-run; modelfleet manager gc --grace 3600
    """
    with open_client(manager=manager) as client:
        garbage = client.collect_garbage(dry_run=dry_run, grace_s=grace, timeout_s=timeout)
    if as_json:
        print_json({"dry_run": dry_run, "garbage": garbage})
        return
    if garbage.sizes:
        rows = ((sha256, f"{size / 1e6:.1f} MB") for sha256, size in garbage.sizes.items())
        print_table("Garbage" if dry_run else "Deleted", ("blob", "size"), rows)
    if garbage.blob_count > len(garbage.sizes):
        tell(f"Only the first {len(garbage.sizes)} are named.")
    what = "would be deleted" if dry_run else "deleted"
    tell(f"{garbage.blob_count} blobs {what}, {garbage.bytes / 1e6:.1f} MB.")


@commands.command()
def check(
    *,
    repair: Annotated[
        bool,
        typer.Option(
            "--repair",
            help="Delete what is of no use: corrupt bytes, which the next push of the bundle sends again, rows of lost "
            "blobs that no version has, and bytes that are no blob.",
        ),
    ] = False,
    manager: ManagerOption = None,
    timeout: _PartTimeoutOption = 3600,
    as_json: JsonOption = False,
) -> None:
    """
    Read every stored blob and compare it with its digest; find lost blobs, and bytes that are no blob.

    Ends with 0 when all is right, and with 1 when something is wrong, repaired or not. What a model version has lost
    comes back when its bundle is pushed again.

    Examples: modelfleet manager check; modelfleet manager check --repair --json
    """
    with open_client(manager=manager) as client:
        bar = Progress(TextColumn("{task.description}"), console=Console(stderr=True))
        bar.disable = not bar.console.is_terminal
        with bar:
            task = bar.add_task("Checking …", total=None)
            report = client.check_blobs(
                repair=repair,
                progress=lambda so_far: bar.update(task, description=_told(so_far)),
                timeout_s=timeout,
            )
    if as_json:
        print_json(report)
    elif report.problems:
        rows = (
            (
                problem.kind,
                problem.sha256,
                problem.detail,
                ", ".join(problem.model_versions) or "none",
                "yes" if problem.repaired else "no",
            )
            for problem in report.problems
        )
        print_table("Problems", ("kind", "blob", "what", "versions", "deleted"), rows)
    tell(_told(report))
    if report.problems:
        raise typer.Exit(ExitCode.FAILED)


def _told(report: BlobReport) -> str:
    return (
        f"{report.checked_blobs} blobs checked, {report.checked_bytes / 1e6:.1f} MB read, "
        f"{len(report.problems)} problems."
    )
