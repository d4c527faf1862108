"""Parameters of the Open Inference Protocol: each is honoured or refused, none ignored."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from modelfleet.api.oip.v2 import open_inference_pb2 as pb
from modelfleet.bundle.manifest import Aggregation, Task
from modelfleet.inference.tokenization import Truncation
from modelfleet.runtime.errors import InvalidInputError

TRUNCATIONS = MappingProxyType({"forbidden": Truncation.FORBIDDEN, "right": Truncation.RIGHT, "left": Truncation.LEFT})


@dataclass(frozen=True, slots=True)
class InferParameters:
    """
    What a request asks beside its tensors.

    A text that is too long is refused where neither `truncation` nor `stride` says what to do. `deadline` is the
    caller's, in seconds on the monotonic clock.
    """

    deadline: float
    truncation: Truncation = Truncation.FORBIDDEN
    stride: int | None = None
    normalize: bool | None = None
    dimensions: int = 0
    top_k: int = 0
    min_score: float = 0.0
    aggregation: Aggregation | None = None
    raw_scores: bool = False


# By name: the field of `InferParameters`, the tasks that have it (none: all), and its kind.
_TEXT = (Task.EMBED, Task.CLASSIFY, Task.ENTITIES, Task.RERANK)
_PARAMETERS: Mapping[str, tuple[str, tuple[Task, ...], str]] = MappingProxyType(
    {
        "truncation": ("truncation", _TEXT, "a string"),
        "window_stride": ("stride", _TEXT, "an integer"),
        "normalize": ("normalize", (Task.EMBED,), "true or false"),
        "dimensions": ("dimensions", (Task.EMBED,), "an integer"),
        "top_k": ("top_k", (Task.CLASSIFY,), "an integer"),
        "min_score": ("min_score", (Task.ENTITIES,), "a number"),
        "aggregation": ("aggregation", (Task.ENTITIES,), "a string"),
        "raw_scores": ("raw_scores", (Task.RERANK,), "true or false"),
        "timeout": ("deadline", (), "an integer"),
        "priority": ("", (), "an integer"),
    }
)
_CHOICES = MappingProxyType(
    {
        "a string": ("string_param",),
        "an integer": ("int64_param", "uint64_param"),
        "true or false": ("bool_param",),
        "a number": ("double_param", "int64_param", "uint64_param"),
    }
)
# Of Triton's extensions that this server does not list.
_ELSEWHERE = MappingProxyType(
    {
        "sequence": "is of a sequence, which this server does not keep: each request stands for itself",
        "shared_memory": "says that the tensor is in shared memory, which this server does not read: send it along",
    }
)


def read_parameters(request: pb.ModelInferRequest, task: Task, deadline: float) -> InferParameters:
    """
    Return what a request asks of a model of `task`.

    Raises InvalidInputError for a parameter that is unknown, of another kind, or without meaning for the task.
    """
    values: dict[str, Any] = {}
    for name, parameter in request.parameters.items():
        field, tasks, kind = _PARAMETERS.get(name, ("", (), ""))
        if not kind or (tasks and task not in tasks):
            known = [known for known, (_, of, _) in _PARAMETERS.items() if not of or task in of]
            raise _unknown(f"The parameter {name!r} of a request to a model of the task {task.value!r}", name, known)
        value = _READERS.get(name, _as_it_is)(name, _value(name, parameter, kind))
        if field:
            values[field] = value
    deadline = min(deadline, values.pop("deadline", math.inf))
    if values.get("stride") is not None and "truncation" in values:
        raise InvalidInputError(
            "Both truncation and window_stride are given: a text is cut or covered by windows. Give one of them.",
            field="parameters",
        )
    return InferParameters(deadline=deadline, **values)


def check_inputs(request: pb.ModelInferRequest) -> None:
    """Raise InvalidInputError for a parameter of an input: there is none."""
    for tensor in request.inputs:
        for name in tensor.parameters:
            raise _unknown(f"The parameter {name!r} of the input {tensor.name!r}", name, ())


def class_count(output: pb.ModelInferRequest.InferRequestedOutputTensor) -> int:
    """Return how many classes are asked for of an output in place of its numbers; 0 for the numbers."""
    count = 0
    for name, parameter in output.parameters.items():
        if name != "classification":
            raise _unknown(f"The parameter {name!r} of the output {output.name!r}", name, ["classification"])
        count = _value(name, parameter, "an integer")
        if count < 1:
            raise InvalidInputError(
                f"classification of the output {output.name!r} is {count}. Give 1 or more.", field="outputs"
            )
    return count


def _value(name: str, parameter: pb.InferParameter, kind: str) -> Any:
    choice = parameter.WhichOneof("parameter_choice")
    if choice not in _CHOICES[kind]:
        raise InvalidInputError(
            f"The parameter {name!r} is given as {choice or 'nothing'}. It is {kind}: {' or '.join(_CHOICES[kind])}.",
            field="parameters",
        )
    return getattr(parameter, choice)


def _truncation(_: str, value: str) -> Truncation:
    if value not in TRUNCATIONS:
        raise InvalidInputError(
            f"The parameter 'truncation' is {value!r}. Use one of {', '.join(TRUNCATIONS)}.", field="parameters"
        )
    return TRUNCATIONS[value]


def _aggregation(_: str, value: str) -> Aggregation:
    if value not in list(Aggregation):
        raise InvalidInputError(
            f"The parameter 'aggregation' is {value!r}. Use one of {', '.join(Aggregation)}.", field="parameters"
        )
    return Aggregation(value)


def _deadline(_: str, microseconds: int) -> float:
    if microseconds < 1:
        raise InvalidInputError(
            f"The parameter 'timeout' is {microseconds} microseconds. Give 1 or more.", field="parameters"
        )
    return time.monotonic() + microseconds / 1e6


def _priority(_: str, value: int) -> None:
    if value:
        raise InvalidInputError(
            f"The parameter 'priority' is {value}: all requests have the same here. Leave it out.", field="parameters"
        )


def _as_it_is(_: str, value: Any) -> Any:
    return value


_READERS: Mapping[str, Callable[[str, Any], Any]] = MappingProxyType(
    {"truncation": _truncation, "aggregation": _aggregation, "timeout": _deadline, "priority": _priority}
)


def _unknown(what: str, name: str, known: list[str] | tuple[str, ...]) -> InvalidInputError:
    for beginning, problem in _ELSEWHERE.items():
        if name.startswith(beginning):
            return InvalidInputError(f"{what} {problem}.", field="parameters")
    there = f"There are {', '.join(known)}" if known else "There is none"
    return InvalidInputError(f"{what} is not known. {there}.", field="parameters")
