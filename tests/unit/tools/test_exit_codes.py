import pytest
from modelfleet.runtime import errors
from modelfleet.runtime.errors import ModelfleetError
from modelfleet_tools.exit_codes import ExitCode, exit_code


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (errors.InvalidInputError, ExitCode.FAILED),
        (errors.InvalidBundleError, ExitCode.FAILED),
        (errors.InternalError, ExitCode.FAILED),
        (errors.ModelLoadingError, ExitCode.UNAVAILABLE),
        (errors.TokenizerUnreachableError, ExitCode.UNAVAILABLE),
        (errors.OverloadedError, ExitCode.UNAVAILABLE),
        (errors.DeadlineExpiredError, ExitCode.UNAVAILABLE),
        (errors.ModelNotFoundError, ExitCode.NOT_FOUND),
        (errors.AliasNotFoundError, ExitCode.NOT_FOUND),
        (errors.NotServedHereError, ExitCode.NOT_FOUND),
    ],
)
def test_scripts_can_tell_errors_apart(kind: type[ModelfleetError], code: ExitCode) -> None:
    assert exit_code(kind("why")) is code


def test_every_error_has_an_exit_code_that_is_no_success() -> None:
    kinds = [ModelfleetError]
    for kind in kinds:
        kinds += kind.__subclasses__()

    assert all(exit_code(kind("why")) for kind in kinds)
