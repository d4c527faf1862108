"""Evicts a pod as a node's drain does: politely, and only where a disruption budget allows it."""

import time
from http import HTTPStatus
from pathlib import Path

from kubernetes import client, config
from kubernetes.client import ApiException
from modelfleet.runtime.errors import DeadlineExpiredError, StateConflictError

_NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
_POLL_S = 0.5
_FEWEST_PODS = 2
_REMEDIES: dict[int, str] = {
    HTTPStatus.UNAUTHORIZED: " The Kubernetes API does not take the credentials: renew them, and run it again.",
    HTTPStatus.FORBIDDEN: " Give it `list` on pods and `create` on pods/eviction, as the chart's test.drain does.",
}


def evict_one(selector: str, timeout_s: float) -> str:
    """
    Evict one of the pods that a label selector finds, and return its name once it is gone.

    Raises StateConflictError where fewer than two would be left to answer, and DeadlineExpiredError when a budget does
    not allow it, or the pod is not gone, within `timeout_s`.
    """
    deadline = time.monotonic() + timeout_s
    _load_config()
    with client.ApiClient() as connection:
        api = client.CoreV1Api(connection)
        namespace = _namespace()
        names = _names(api, namespace, selector)
        if len(names) < _FEWEST_PODS:
            raise StateConflictError(f"{selector} finds {len(names)} pods. Evicting one needs another that answers.")
        _evict(api, namespace, names[0], deadline)
        while names[0] in _names(api, namespace, selector):
            if time.monotonic() > deadline:
                raise DeadlineExpiredError(f"{names[0]} is not gone in time. Does it drain for longer?")
            time.sleep(_POLL_S)
    return names[0]


def _load_config() -> None:
    """Take the pod's own credentials, or else the kubeconfig's. The library's way warns of the pod's."""
    try:
        config.load_incluster_config()  # type: ignore[no-untyped-call]  # ships no hints
    except config.ConfigException:
        try:
            config.load_kube_config()  # type: ignore[no-untyped-call]  # ships no hints
        except config.ConfigException as error:
            raise StateConflictError(
                "No Kubernetes API is known: there is neither a ServiceAccount's token nor a kubeconfig. "
                "Set KUBECONFIG, or leave out --evict."
            ) from error


def _evict(api: client.CoreV1Api, namespace: str, name: str, deadline: float) -> None:
    eviction = client.V1Eviction(metadata=client.V1ObjectMeta(name=name, namespace=namespace))
    while True:
        try:
            api.create_namespaced_pod_eviction(name, namespace, eviction)
        except ApiException as error:
            # 429 is how the API says that a budget does not allow it now.
            if error.status != HTTPStatus.TOO_MANY_REQUESTS:
                raise _refused(f"{name} cannot be evicted", error) from error
            if time.monotonic() > deadline:
                raise DeadlineExpiredError(f"A disruption budget does not allow to evict {name}.") from error
            time.sleep(_POLL_S)
        else:
            return


def _names(api: client.CoreV1Api, namespace: str, selector: str) -> list[str]:
    try:
        pods = api.list_namespaced_pod(namespace, label_selector=selector).items or []
    except ApiException as error:
        raise _refused("Pods cannot be listed", error) from error
    return sorted(str(pod.metadata.name) for pod in pods if pod.metadata)


def _refused(what: str, error: ApiException) -> StateConflictError:
    return StateConflictError(f"{what}: {error.status}, {error.reason}.{_REMEDIES.get(error.status or 0, '')}")


def _namespace() -> str:
    if _NAMESPACE_FILE.exists():
        return _NAMESPACE_FILE.read_text()
    _, active = config.list_kube_config_contexts()  # type: ignore[no-untyped-call]  # ships no hints
    return str(active["context"].get("namespace", "default"))
