"""Pools as Deployments of a namespace."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from http import HTTPStatus

import aiohttp
from kubernetes.aio import config
from kubernetes.aio.client import ApiClient, ApiException, AppsV1Api, Configuration, CoreV1Api

from modelfleet.manager.pools.pool import Pool, check_replicas, find_pool
from modelfleet.manager.pools.reflector import Reflector, retry_after_s
from modelfleet.manager.pools.workloads import pools_of
from modelfleet.runtime.errors import (
    InternalError,
    KubernetesUnreachableError,
    ModelfleetError,
    OverloadedError,
    PoolNotFoundError,
    StateConflictError,
)

_MERGE_PATCH = "application/merge-patch+json"
_CALL_TIMEOUT_S = 15.0

_REMEDIES = {
    HTTPStatus.UNAUTHORIZED: (
        "It does not take the manager's token, as after its ServiceAccount was made anew: delete the manager's pod, so "
        "that its successor has a new one."
    ),
    HTTPStatus.FORBIDDEN: (
        "The manager's Role lacks `list` and `watch` on deployments and pods, or `patch` on deployments/scale: install "
        "the chart with manager.rbac.create."
    ),
}


@asynccontextmanager
async def kubernetes_client() -> AsyncIterator[ApiClient]:
    """
    Give a client of the cluster that this process runs in, or else of the current context of the kubeconfig.

    Raises KubernetesUnreachableError where there is neither.
    """
    configuration = Configuration()
    try:
        config.load_incluster_config(client_configuration=configuration)  # type: ignore[no-untyped-call]  # ships no hints
    except config.ConfigException:
        try:
            await config.load_kube_config(client_configuration=configuration)  # type: ignore[no-untyped-call]  # ships no hints
        except config.ConfigException as error:
            raise KubernetesUnreachableError(
                "no Kubernetes API is known: there is neither a ServiceAccount's token nor a kubeconfig. Mount the "
                "token (the chart's manager.pools), or set --pools local."
            ) from error
    async with ApiClient(configuration) as client:
        yield client


class KubernetesPools:
    """
    The Deployments of `namespace` that `selector` finds, told apart by their label `modelfleet.dev/pool`.

    They and their pods are watched while `run` runs; what is known stays so while the API cannot be reached.
    """

    def __init__(
        self,
        client: ApiClient,
        namespace: str,
        selector: str,
        *,
        resync_s: float = 300,
        longest_pause_s: float = 30,
    ) -> None:
        self._apps = AppsV1Api(client)
        self._namespace = namespace
        reflect = partial(Reflector, resync_s=resync_s, longest_pause_s=longest_pause_s)
        list_deployments = self._apps.list_namespaced_deployment_without_preload_content
        list_pods = CoreV1Api(client).list_namespaced_pod_without_preload_content
        self._deployments = reflect("deployments", partial(list_deployments, namespace, label_selector=selector))
        self._pods = reflect("pods", partial(list_pods, namespace, label_selector=selector))

    async def run(self) -> None:
        """Watch until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._deployments.run())
            group.create_task(self._pods.run())

    async def list(self) -> tuple[Pool, ...]:
        """Return the pools as last seen, ordered by name. Raises KubernetesUnreachableError before the first time."""
        return tuple(self._known())

    async def scale(self, pool: str, replicas: int) -> Pool:
        """Patch the scale of the pool's Deployment and nothing else of it, unless something else sets the number."""
        check_replicas(replicas)
        known = self._known()
        found = find_pool(tuple(known), pool)
        if found.autoscaler:
            raise StateConflictError(
                f"{pool} is scaled by an autoscaler ({found.autoscaler}), which would change the number again. Change "
                f"inference.pools.{pool}.autoscaling of its release instead."
            )
        if found.scaled_by_release:
            # Kubernetes would take the number for the manager's, and the release's next upgrade end in a conflict.
            raise StateConflictError(
                f"The number of workers of {pool} is set by its Helm release. Set inference.pools.{pool}.replicas "
                f"there, or inference.pools.{pool}.manageReplicas=false to scale it here."
            )
        try:
            scale = await self._apps.patch_namespaced_deployment_scale(
                known[found],
                self._namespace,
                {"spec": {"replicas": replicas}},
                field_manager="modelfleet-manager",
                _content_type=_MERGE_PATCH,
                _request_timeout=_CALL_TIMEOUT_S,
            )
        except ApiException as error:
            raise _explained(error, pool) from error
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise KubernetesUnreachableError(
                f"The Kubernetes API cannot be reached, so {pool} may not be scaled: {error!r}. Try again."
            ) from error
        return replace(found, desired_replicas=scale.spec.replicas or 0 if scale.spec else replicas)

    def _known(self) -> dict[Pool, str]:
        """Return the pools, ordered, and the name of each one's Deployment."""
        deployments_time, pods_time = self._deployments.observe_time, self._pods.observe_time
        if deployments_time is None or pods_time is None:
            problem = self._deployments.problem or self._pods.problem or "nothing yet"
            known = (remedy for status, remedy in _REMEDIES.items() if problem.startswith(str(int(status))))
            remedy = next(known, "Try again.")
            raise KubernetesUnreachableError(
                f"Pools are not known: since the manager started, the Kubernetes API has answered {problem}. {remedy}"
            )
        both = min(deployments_time, pods_time)
        return dict(pools_of(self._deployments.objects.values(), self._pods.objects.values(), both))


def _explained(error: ApiException, pool: str) -> ModelfleetError:
    """Return what a refusal of the API means to whoever scales."""
    match error.status:
        case HTTPStatus.NOT_FOUND:
            return PoolNotFoundError(f"The Deployment of pool {pool!r} was deleted.", field="pool")
        case HTTPStatus.UNAUTHORIZED | HTTPStatus.FORBIDDEN as status:
            return StateConflictError(
                f"The manager may not scale {pool}: the Kubernetes API answered {status}. "
                + _REMEDIES[HTTPStatus(status)]
            )
        case HTTPStatus.CONFLICT | HTTPStatus.UNPROCESSABLE_ENTITY:
            return StateConflictError(f"Kubernetes refuses to scale {pool}: {error.reason}.")
        case HTTPStatus.TOO_MANY_REQUESTS:
            busy = OverloadedError(f"The Kubernetes API is busy, so {pool} is not scaled. Try again.")
            busy.retry_after_s = max(retry_after_s(error), 1.0)
            return busy
        case status if status is not None and status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            return KubernetesUnreachableError(f"The Kubernetes API answered {status}, so {pool} may not be scaled.")
    return InternalError(f"The Kubernetes API answered {error.status} to a request to scale {pool}.")
