"""Calls that ask a worker what it holds."""

import time

from modelfleet.api.inference.v1 import inference_pb2 as pb
from modelfleet.api.manager.v1 import version_state_pb2
from modelfleet.bundle.reference import ModelReference
from modelfleet.client.answers import ServedModel
from modelfleet.client.steps import Method, Procedure, Service, ask, pause
from modelfleet.runtime.errors import DeadlineExpiredError, StateConflictError, UnavailableError

_PATH = "/modelfleet.api.inference.v1.InferenceService"
LIST_SERVED_MODELS = Method(Service.INFERENCE, f"{_PATH}/ListServedModels", pb.ListServedModelsResponse)

_POLL_S = 0.1


def served_models(*, timeout_s: float | None = None) -> Procedure[tuple[ServedModel, ...]]:
    """List the model versions that a worker holds, in any state, ordered by name and number."""
    return (yield from _listed(timeout_s))


def wait_until_served(model: str, *, model_version: int | None = None, timeout_s: float = 60) -> Procedure[ServedModel]:
    """
    Return once a worker has the model version READY that `model` names, and `model_version` if given.

    Raises StateConflictError with the worker's reason when the version fails to load, and DeadlineExpiredError, with
    what the worker said last, after `timeout_s`. A worker that cannot be reached yet is waited for.
    """
    reference = ModelReference.parse(model)
    number = model_version or reference.model_version
    deadline = time.monotonic() + timeout_s
    last = "no worker answered"
    while (remaining := deadline - time.monotonic()) > 0:
        try:
            served = yield from _listed(remaining, wait_for_ready=True)
        except (UnavailableError, DeadlineExpiredError) as error:
            last = error.message
        else:
            candidates = [one for one in served if one.model == reference.model and number in (None, one.model_version)]
            for one in candidates:
                if one.state == "READY" and (reference.alias is None or reference.alias in one.aliases):
                    return one
                if one.state == "FAILED" and (number or reference.alias in one.aliases):
                    raise StateConflictError(f"{one.model}@{one.model_version} cannot be served: {one.state_reason}")
            last = "the worker holds " + (
                ", ".join(f"{one.model}@{one.model_version} ({one.state})" for one in candidates)
                or f"no version of {reference.model!r}"
            )
        yield from pause(min(_POLL_S, max(remaining, 0)))
    raise DeadlineExpiredError(f"{reference} is not served after {timeout_s:g} s: {last}.")


def _listed(timeout_s: float | None, *, wait_for_ready: bool = False) -> Procedure[tuple[ServedModel, ...]]:
    models: list[ServedModel] = []
    request = pb.ListServedModelsRequest()
    while True:
        page = yield from ask(LIST_SERVED_MODELS, request, timeout_s, wait_for_ready=wait_for_ready)
        models.extend(_served_model(model) for model in page.models)
        if not page.next_page_token:
            return tuple(models)
        request = pb.ListServedModelsRequest(page_token=page.next_page_token)


def _served_model(served: pb.ServedModel) -> ServedModel:
    return ServedModel(
        model=served.model,
        model_version=served.model_version,
        bundle_digest=served.bundle_digest,
        task=pb.Task.Name(served.task).removeprefix("TASK_").lower(),
        state=version_state_pb2.VersionState.Name(served.state).removeprefix("VERSION_STATE_"),
        state_reason=served.state_reason,
        aliases=tuple(served.aliases),
        providers=tuple(served.providers),
        max_tokens=served.max_tokens,
        max_batch_tokens=served.max_batch_tokens,
        labels=tuple(served.labels),
        tokenizer_digest=served.tokenizer_digest,
        batching=pb.Batching.Name(served.batching).removeprefix("BATCHING_").lower().replace("_", "-")
        if served.batching
        else "",
        batching_deviation=served.batching_deviation,
    )
