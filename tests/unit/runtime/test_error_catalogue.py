import re
from collections.abc import Iterator
from pathlib import Path

import grpc
import modelfleet
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from modelfleet.api.errors.v1.errors_pb2 import ErrorReason
from modelfleet.runtime import errors
from modelfleet.runtime.errors import ModelfleetError, Reason
from modelfleet.runtime.status import CODES, pushback, to_status

PREFIX = "ERROR_REASON_"
PROTO = Path(modelfleet.__file__).parents[2] / "protos/modelfleet/api/errors/v1/errors.proto"


def subclasses(kind: type[ModelfleetError]) -> Iterator[type[ModelfleetError]]:
    for subclass in kind.__subclasses__():
        yield subclass
        yield from subclasses(subclass)


# Classes of the product; tests may define more.
CLASSES = [kind for kind in subclasses(ModelfleetError) if kind.__module__ == errors.__name__]
RAISED = [kind for kind in CLASSES if "reason" in vars(kind)]


def proto_comments() -> dict[str, str]:
    """The comment above each value of ErrorReason, without the prefix of its name."""
    blocks = re.findall(r"((?:  // .*\n)+)  " + PREFIX + r"(\w+) = \d+;", PROTO.read_text())
    return {name: " ".join(line.strip(" /") for line in block.splitlines()) for block, name in blocks}


def test_every_reason_has_one_class_and_one_code() -> None:
    assert sorted(kind.reason for kind in RAISED) == sorted(Reason)
    assert set(CODES) == set(Reason)


def test_reasons_are_those_of_the_contract() -> None:
    published = {name.removeprefix(PREFIX) for name in ErrorReason.keys()} - {"UNSPECIFIED"}  # noqa: SIM118  no mapping

    assert {reason.value for reason in Reason} == published
    assert all(reason.name == reason.value for reason in Reason)


@pytest.mark.parametrize("kind", RAISED)
def test_the_contract_documents_the_code_and_the_retry(kind: type[ModelfleetError]) -> None:
    comment = proto_comments()[kind.reason.value]

    code, retry = re.fullmatch(r"([A-Z_]+)( with RetryInfo)?\. .+", comment).groups()
    assert code == CODES[kind.reason].name
    assert bool(retry) == (kind.retry_after_s is not None)


def test_the_tree_atop_the_errors_is_the_tree_of_classes() -> None:
    drawn: dict[int, str] = {}
    parents: dict[str, str] = {}
    for indent, name in re.findall(r"^([│├└─ ]*)(\w+Error)\b", errors.__doc__ or "", re.MULTILINE):
        depth = len(indent) // 4
        drawn[depth] = name
        if depth:
            parents[name] = drawn[depth - 1]

    assert parents == {kind.__name__: kind.__base__.__name__ for kind in CLASSES}


def test_a_status_tells_reason_request_id_field_and_retry() -> None:
    error = errors.OverloadedError("The queue is full.", field="texts")

    status = to_status(error, "id-1")

    assert (status.code, status.details) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "The queue is full.")
    [(key, value)] = status.trailing_metadata
    assert key == "grpc-status-details-bin"
    info, retry, bad = rpc_status.status_pb2.Status.FromString(value).details
    unpacked = error_details_pb2.ErrorInfo()
    assert info.Unpack(unpacked)
    assert (unpacked.reason, unpacked.domain, dict(unpacked.metadata)) == (
        "OVERLOADED",
        "modelfleet",
        {"request_id": "id-1"},
    )
    delay = error_details_pb2.RetryInfo()
    assert retry.Unpack(delay)
    assert delay.retry_delay.ToMilliseconds() == 200
    request = error_details_pb2.BadRequest()
    assert bad.Unpack(request)
    assert request.field_violations[0].field == "texts"
    assert pushback(error) == (("grpc-retry-pushback-ms", "200"),)


def test_what_is_not_worth_a_retry_has_no_pushback() -> None:
    assert pushback(errors.InvalidInputError("no")) == ()


@pytest.mark.parametrize("kind", [errors.InvalidInputError, errors.WrongTaskError, errors.InvalidBundleError])
def test_an_invalid_argument_always_has_a_bad_request(kind: type[ModelfleetError]) -> None:
    [(_, value)] = to_status(kind("What is wrong."), "id-1").trailing_metadata
    request = error_details_pb2.BadRequest()
    assert rpc_status.status_pb2.Status.FromString(value).details[-1].Unpack(request)
    assert [(each.field, each.description) for each in request.field_violations] == [("", "What is wrong.")]
