"""What Deployments and pods say of pools."""

from collections.abc import Iterable, Iterator
from datetime import datetime

from kubernetes.utils.quantity import parse_quantity

from modelfleet.manager.pools.pool import Pool, PoolWorker
from modelfleet.manager.pools.reflector import ApiObject

POOL_LABEL = "modelfleet.dev/pool"
# What the chart says of a pool on its Deployment.
GPU_RESOURCE = "modelfleet.dev/gpu-resource"
AUTOSCALER = "modelfleet.dev/autoscaler"
REPLICAS = "modelfleet.dev/replicas"
_BY_RELEASE = "release"

# A mesh may put its own container before it.
_CONTAINER = "inference"
# What a container says while all goes well.
_STARTING = (None, "ContainerCreating", "PodInitializing")
_ENDED = ("Failed", "Succeeded")
_LONGEST_LINE = 500


def pools_of(
    deployments: Iterable[ApiObject], pods: Iterable[ApiObject], observe_time: datetime
) -> Iterator[tuple[Pool, str]]:
    """Yield each pool with the name of its Deployment, ordered by pool. Objects without a pool's label are others'."""
    by_pool: dict[str, list[ApiObject]] = {}
    for pod in pods:
        by_pool.setdefault(_pool_label(pod), []).append(pod)
    for deployment in sorted(deployments, key=_pool_label):
        if name := _pool_label(deployment):
            yield _pool(name, deployment, by_pool.get(name, []), observe_time), deployment["metadata"]["name"]


def _pool(name: str, deployment: ApiObject, pods: list[ApiObject], observe_time: datetime) -> Pool:
    # Pods that have ended stay for days, beside those that took their place.
    living = [pod for pod in pods if pod["status"].get("phase") not in _ENDED]
    workers = sorted(map(_worker, living), key=lambda worker: worker.worker)
    ready = sum(worker.ready for worker in workers)
    desired = deployment["spec"].get("replicas", 1)  # as the API defines it
    template = deployment["spec"]["template"]["spec"]
    annotations = deployment["metadata"].get("annotations", {})
    resource = annotations.get(GPU_RESOURCE, "")
    problem = _deployment_problem(deployment)
    if not problem and ready < desired:
        problem = _last_end(pods)
    return Pool(
        pool=name,
        desired_replicas=desired,
        ready_replicas=ready,
        workers=tuple(workers),
        observe_time=observe_time,
        gpu_resource=resource,
        gpus_per_worker=_gpus(template, resource) if resource else 0,
        images=tuple(sorted({_image(template), *(worker.image for worker in workers)})),
        problem=problem,
        autoscaler=annotations.get(AUTOSCALER, ""),
        scaled_by_release=annotations.get(REPLICAS) == _BY_RELEASE,
    )


def _worker(pod: ApiObject) -> PoolWorker:
    problem = _pod_problem(pod)
    return PoolWorker(
        worker=pod["metadata"]["name"],
        ready=not problem,
        problem=problem,
        node=pod["spec"].get("nodeName", ""),
        image=_image(pod["spec"]),
        restart_count=sum(status.get("restartCount", 0) for status in pod["status"].get("containerStatuses", ())),
    )


def _gpus(template: ApiObject, resource: str) -> int:
    """Return how many of a resource a worker asks for; the API may write 4000 as 4k."""
    limits = (container.get("resources", {}).get("limits", {}) for container in template["containers"])
    asked = next((limit[resource] for limit in limits if resource in limit), "0")
    return int(parse_quantity(asked))  # type: ignore[no-untyped-call]  # ships no hints


def _deployment_problem(deployment: ApiObject) -> str:
    for condition in deployment.get("status", {}).get("conditions", ()):
        if (condition["type"], condition["status"]) in (("ReplicaFailure", "True"), ("Progressing", "False")):
            return _said(condition)
    return ""


def _last_end(pods: Iterable[ApiObject]) -> str:
    """Return how the newest of the pods that have ended did so, empty when none has."""
    ended = [pod for pod in pods if pod["status"].get("phase") in _ENDED]
    if not ended:
        return ""
    last = max(ended, key=lambda pod: pod["metadata"].get("creationTimestamp", ""))
    status = last["status"]
    return f"{last['metadata']['name']} ended. {_said({'reason': status['phase'], **status})}"


def _pod_problem(pod: ApiObject) -> str:
    """Return why a pod does not answer requests: the first cause in the order in which pods come to life."""
    status = pod["status"]
    conditions = {condition["type"]: condition for condition in status.get("conditions", ())}
    containers = status.get("containerStatuses", ())
    waiting = [_waiting(container) for container in containers]
    problem = ""
    if pod["metadata"].get("deletionTimestamp"):
        problem = "Terminating: finishes its requests"
    elif conditions.get("PodScheduled", {}).get("status") == "False":
        problem = _said(conditions["PodScheduled"])
    elif any(waiting):
        problem = next(filter(None, waiting))
    elif conditions.get("Ready", {}).get("status") != "True":
        running = status.get("phase") == "Running"
        problem = "NotReady: loads its models, or drains" if running else "Pending: its container is being started"
        problem += "".join(map(_termination, containers))
    return problem


def _waiting(container: ApiObject) -> str:
    waiting = container.get("state", {}).get("waiting", {})
    return "" if waiting.get("reason") in _STARTING else _said(waiting) + _termination(container)


def _termination(container: ApiObject) -> str:
    """Return how a container ended last, with the last line of its log, empty when it has not."""
    states = (container.get(state, {}).get("terminated") for state in ("state", "lastState"))
    ended = next(filter(None, states), None)
    if ended is None:
        return ""
    said = f"; it ended with {ended['exitCode']}, {ended.get('reason', 'Error')}"
    lines = ended.get("message", "").strip().splitlines()
    return f"{said}: {lines[-1][:_LONGEST_LINE]}" if lines else said


def _said(condition: ApiObject) -> str:
    return ": ".join(part for part in (condition.get("reason"), condition.get("message")) if part)


def _image(spec: ApiObject) -> str:
    containers = spec["containers"]
    worker = next((container for container in containers if container["name"] == _CONTAINER), containers[0])
    return str(worker["image"])


def _pool_label(found: ApiObject) -> str:
    return str(found["metadata"].get("labels", {}).get(POOL_LABEL, ""))
