"""`modelfleet rollout start | status | promote | abort | list`."""

import time
from typing import Annotated, TypeAlias

import typer
from modelfleet.client.answers import Rollout, VersionFigures, WorkerProgress
from modelfleet.client.client import Client
from modelfleet.runtime.errors import DeadlineExpiredError, NotFoundError, UnavailableError
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from modelfleet_tools.exit_codes import Commands, ExitCode
from modelfleet_tools.options import DEFAULT_TIMEOUT_S, JsonOption, ManagerOption, TimeoutOption, open_client
from modelfleet_tools.output import print_json, print_table, tell, tell_error

_POLL_S = 0.25
_DEFAULT_WAIT_S = 900.0
_BAR_WIDTH = 30
_STYLES = {"SUCCEEDED": "bold green", "FAILED": "bold red", "ABORTED": "bold yellow"}

commands = typer.Typer(
    cls=Commands,
    help="Move an alias to another version on every worker that serves the model, without a failed request.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

RolloutArgument: TypeAlias = Annotated[
    str, typer.Argument(metavar="ROLLOUT", help="Its number, or NAME[@ALIAS] for the newest of an alias.")
]
WaitOption: TypeAlias = Annotated[
    bool, typer.Option("--wait", "-w", help="Show its progress until it is over; exit with 1 unless it SUCCEEDED.")
]
WaitTimeoutOption: TypeAlias = Annotated[
    float, typer.Option("--wait-timeout", metavar="SECONDS", min=0.001, help="Longest wait; exit with 3 after it.")
]


@commands.command()
def start(
    alias: Annotated[str, typer.Argument(metavar="NAME[@ALIAS]", help="The alias to move; `stable` when left out.")],
    model_version: Annotated[int, typer.Argument(metavar="NUMBER", min=1, help="The version that it shall name.")],
    *,
    canary: Annotated[
        list[int] | None,
        typer.Option(
            min=1, max=99, metavar="PERCENT", help="Give the version this share first; repeat it for further steps."
        ),
    ] = None,
    step_seconds: Annotated[
        float, typer.Option(min=0, help="Least time of each step; 0 waits for `rollout promote` instead.")
    ] = 0,
    min_requests: Annotated[
        int, typer.Option(min=1, help="Requests that the canary must have ended before it is judged.")
    ] = 100,
    max_error_rate: Annotated[
        float | None, typer.Option(min=0, max=1, help="Fail when a larger share of the canary's requests fails.")
    ] = None,
    max_p99_ms: Annotated[
        float | None, typer.Option(min=0.001, help="Fail when the canary's 99th percentile is slower.")
    ] = None,
    max_p99_ratio: Annotated[
        float | None, typer.Option(min=0.001, help="Fail when it is so many times slower than the old version's.")
    ] = None,
    loading_timeout: Annotated[
        float, typer.Option(min=1, metavar="SECONDS", help="Fail when a worker has not loaded it by then.")
    ] = 600,
    rollback_window: Annotated[
        float, typer.Option(min=0, metavar="SECONDS", help="Keep the old version loaded so long after the move.")
    ] = 10,
    wait: WaitOption = False,
    wait_timeout: WaitTimeoutOption = _DEFAULT_WAIT_S,
    manager: ManagerOption = None,
    timeout: TimeoutOption = DEFAULT_TIMEOUT_S,
    as_json: JsonOption = False,
) -> None:
    """
    Begin a rollout.

    Examples: modelfleet rollout start pii 2 --wait;
    modelfleet rollout start pii@stable 2 --canary 10 --canary 50 --step-seconds 60 --max-error-rate 0.01
    """
    percents = canary or ()
    limits = (max_error_rate, max_p99_ms, max_p99_ratio)
    if not percents and (step_seconds or any(limit is not None for limit in limits)):
        raise typer.BadParameter("--step-seconds and the limits are those of a canary. Add --canary PERCENT.")
    with open_client(manager=manager, timeout_s=timeout) as client:
        rollout = client.start_rollout(
            alias,
            model_version,
            canary_percents=percents,
            step_duration_s=step_seconds,
            min_requests=min_requests if percents else 0,
            max_error_rate=max_error_rate,
            max_p99_s=None if max_p99_ms is None else max_p99_ms / 1000,
            max_p99_ratio=max_p99_ratio,
            loading_timeout_s=loading_timeout,
            rollback_window_s=rollback_window,
        )
        _show(client, rollout, wait_s=wait_timeout if wait else 0, as_json=as_json)


@commands.command()
def status(
    rollout: RolloutArgument,
    *,
    wait: WaitOption = False,
    wait_timeout: WaitTimeoutOption = _DEFAULT_WAIT_S,
    manager: ManagerOption = None,
    timeout: TimeoutOption = DEFAULT_TIMEOUT_S,
    as_json: JsonOption = False,
) -> None:
    """
    Show a rollout, or with --wait its progress until it is over.

    Examples: modelfleet rollout status 7; modelfleet rollout status pii@stable --wait
    """
    with open_client(manager=manager, timeout_s=timeout) as client:
        found = _found(client, rollout)
        _show(client, found, wait_s=wait_timeout if wait else 0, as_json=as_json)


@commands.command()
def promote(
    rollout: RolloutArgument,
    *,
    full: Annotated[bool, typer.Option("--full", help="Skip all further steps too.")] = False,
    wait: WaitOption = False,
    wait_timeout: WaitTimeoutOption = _DEFAULT_WAIT_S,
    manager: ManagerOption = None,
    timeout: TimeoutOption = DEFAULT_TIMEOUT_S,
    as_json: JsonOption = False,
) -> None:
    """
    End the current step of a canary.

    Example: modelfleet rollout promote pii@stable --full --wait
    """
    with open_client(manager=manager, timeout_s=timeout) as client:
        promoted = client.promote_rollout(_found(client, rollout).rollout, full=full)
        _show(client, promoted, wait_s=wait_timeout if wait else 0, as_json=as_json)


@commands.command()
def abort(
    rollout: RolloutArgument,
    *,
    reason: Annotated[str, typer.Option(help="Why, for whoever looks at it later.")] = "",
    manager: ManagerOption = None,
    timeout: TimeoutOption = DEFAULT_TIMEOUT_S,
    as_json: JsonOption = False,
) -> None:
    """
    Stop a rollout; the alias names the old version again.

    Example: modelfleet rollout abort pii@stable --reason "labels look odd"
    """
    with open_client(manager=manager, timeout_s=timeout) as client:
        aborted = client.abort_rollout(_found(client, rollout).rollout, reason)
    _print(aborted, as_json=as_json)


@commands.command(name="list")
def list_rollouts(
    model: Annotated[str, typer.Argument(metavar="[NAME[@ALIAS]]", help="Only those of a model or an alias.")] = "",
    *,
    limit: Annotated[int, typer.Option(min=1, help="At most so many.")] = 20,
    manager: ManagerOption = None,
    timeout: TimeoutOption = DEFAULT_TIMEOUT_S,
    as_json: JsonOption = False,
) -> None:
    """
    List rollouts, newest first.

    Example: modelfleet rollout list pii@stable
    """
    with open_client(manager=manager, timeout_s=timeout) as client:
        found = client.rollouts(model, limit=limit)
    if as_json:
        print_json({"rollouts": found})
        return
    rows = (
        (
            one.rollout,
            f"{one.model}@{one.alias}",
            _move(one),
            one.state,
            f"{one.percent}%",
            f"{one.create_time:%Y-%m-%d %H:%M:%S}",
            one.reason,
        )
        for one in found
    )
    print_table("Rollouts", ("rollout", "alias", "versions", "state", "share", "created (UTC)", "reason"), rows)


def _found(client: Client, name: str) -> Rollout:
    if name.isdecimal():
        return client.get_rollout(int(name))
    alias = name if "@" in name else f"{name}@stable"
    newest = client.rollouts(alias, limit=1)
    if not newest:
        raise NotFoundError(f"There was no rollout of {alias} yet. List all: modelfleet rollout list")
    return newest[0]


def _show(client: Client, rollout: Rollout, *, wait_s: float, as_json: bool) -> None:
    if wait_s and not rollout.is_over:
        try:
            rollout = _wait(client, rollout, wait_s)
        except KeyboardInterrupt:
            tell(
                f"Rollout {rollout.rollout} goes on. Look again: modelfleet rollout status {rollout.rollout} --wait; "
                f"end it: modelfleet rollout abort {rollout.rollout}"
            )
            raise
    _print(rollout, as_json=as_json)
    if wait_s and rollout.state != "SUCCEEDED":
        tell_error(f"Rollout {rollout.rollout} {rollout.state}: {rollout.reason}")
        raise typer.Exit(ExitCode.FAILED)


def _wait(client: Client, rollout: Rollout, wait_s: float) -> Rollout:
    """Follow a rollout until it is over: live on a terminal, else a line for each event."""
    deadline = time.monotonic() + wait_s
    console = Console(stderr=True)
    shown = 0
    with Live(_drawn(rollout), console=console, auto_refresh=False, transient=True) as live:
        while not rollout.is_over:
            if time.monotonic() > deadline:
                raise DeadlineExpiredError(
                    f"Rollout {rollout.rollout} is {rollout.state} after {wait_s:g} s, and goes on. "
                    f"Look again: modelfleet rollout status {rollout.rollout} --wait"
                )
            time.sleep(_POLL_S)
            try:
                rollout = client.get_rollout(rollout.rollout)
            except UnavailableError:  # a manager that is restarted goes on where it was
                continue
            if console.is_terminal:
                live.update(_drawn(rollout), refresh=True)
                continue
            for event in rollout.events[shown:]:
                tell(f"{event.time:%H:%M:%S} {event.state} {event.percent}% {event.reason}".rstrip())
            shown = len(rollout.events)
    return rollout


def _drawn(rollout: Rollout) -> Group:
    waiting = [worker for worker in rollout.workers if not _is_ready(rollout, worker)]
    head = Text(f"Rollout {rollout.rollout}: {rollout.model}@{rollout.alias} {_move(rollout)}  ", style="bold")
    head.append(rollout.state, style=_STYLES.get(rollout.state, "bold cyan"))
    table = Table.grid(padding=(0, 1))
    if workers := len(rollout.workers):
        ready = workers - len(waiting)
        table.add_row("workers ready", ProgressBar(workers, ready, width=_BAR_WIDTH), f"{ready} of {workers}")
    table.add_row("share of requests", ProgressBar(100, rollout.percent, width=_BAR_WIDTH), f"{rollout.percent}%")
    for name, figures in (("old", rollout.old_figures), ("canary", rollout.new_figures)):
        if figures:
            table.add_row(f"{name} version", "", _figures(figures))
    for worker in waiting:
        table.add_row("", f"{worker.worker}:", f"{worker.state or 'not started'} {worker.reason}".rstrip())
    return Group(head, table)


def _is_ready(rollout: Rollout, worker: WorkerProgress) -> bool:
    # A report from before LOADING is of no use; later ones are, until a newer one says otherwise.
    return worker.is_ready or (worker.state == "READY" and rollout.state not in ("PENDING", "LOADING"))


def _print(rollout: Rollout, *, as_json: bool) -> None:
    if as_json:
        print_json(rollout)
        return
    print(f"Rollout {rollout.rollout} of {rollout.model}@{rollout.alias} {_move(rollout)}: {rollout.state}")
    rows = ((f"{event.time:%H:%M:%S}", event.state, f"{event.percent}%", event.reason) for event in rollout.events)
    print_table("States", ("time (UTC)", "state", "share", "reason"), rows)
    if rollout.workers:
        held = (
            (one.worker, one.pool, one.state or "not started", "yes" if one.current else "no", one.reason)
            for one in rollout.workers
        )
        print_table("Workers", ("worker", "pool", "new version", "up to date", "reason"), held)
    if rollout.old_figures and rollout.new_figures:
        print_table(
            "This step",
            ("version", "requests", "failed", "p99"),
            (
                (name, figures.request_count, figures.failure_count, _p99(figures))
                for name, figures in (("old", rollout.old_figures), ("canary", rollout.new_figures))
            ),
        )


def _move(rollout: Rollout) -> str:
    return f"{rollout.old_model_version or 'none'} → {rollout.model_version}"


def _figures(figures: VersionFigures) -> str:
    return f"{figures.request_count} requests, {figures.failure_count} failed, p99 {_p99(figures)}"


def _p99(figures: VersionFigures) -> str:
    return "none" if figures.p99_s is None else f"{figures.p99_s * 1000:.0f} ms"
