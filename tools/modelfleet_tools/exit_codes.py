"""How the command ends: one table from errors to exit codes, and the sentence on standard error."""

from enum import IntEnum
from typing import Any

import typer
from modelfleet.runtime import errors
from modelfleet.runtime.errors import ModelfleetError
from typer.core import TyperGroup

from modelfleet_tools.output import tell_error


class ExitCode(IntEnum):
    """What scripts may rely on."""

    OK = 0
    FAILED = 1
    USAGE = 2
    UNAVAILABLE = 3
    NOT_FOUND = 4
    SOME_FAILED = 5
    ALL_FAILED = 6
    INTERRUPTED = 130


EPILOG = (
    "Exit codes: 0 done; 1 the request failed; 2 wrong usage; 3 a service is unreachable, loading or overloaded, so "
    "that a retry may help; 4 no such model, version, alias or sample; 5 some rows of a batch failed; 6 all did; "
    "130 interrupted."
)

# The first class that fits holds.
_BY_ERROR: tuple[tuple[type[ModelfleetError], ExitCode], ...] = (
    (errors.UnavailableError, ExitCode.UNAVAILABLE),
    (errors.OverloadedError, ExitCode.UNAVAILABLE),
    (errors.DeadlineExpiredError, ExitCode.UNAVAILABLE),
    (errors.NotFoundError, ExitCode.NOT_FOUND),
    (errors.NotServedHereError, ExitCode.NOT_FOUND),
    (ModelfleetError, ExitCode.FAILED),
)


def exit_code(error: ModelfleetError) -> ExitCode:
    """Return the exit code that tells of an error."""
    return next(code for kind, code in _BY_ERROR if isinstance(error, kind))


class Commands(TyperGroup):
    """A group of commands whose errors end as one sentence and an exit code."""

    def invoke(self, ctx: Any) -> object:  # typer's context is click's or its own, by version
        """Run the command that was asked for."""
        try:
            return super().invoke(ctx)
        except ModelfleetError as error:
            tell_error(error.message)
            raise typer.Exit(exit_code(error)) from error
        except KeyboardInterrupt:
            tell_error("Interrupted.")
            raise typer.Exit(ExitCode.INTERRUPTED) from None
