"""What Deployments and pods say of pools."""

from collections.abc import Iterable, Iterator
from datetime import datetime

from modelfleet.manager.pools.pool import Pool, PoolWorker
from modelfleet.manager.pools.reflector import ApiObject

POOL_LABEL = "modelfleet.dev/pool"

# What a container says while all goes well.
_STARTING = (None, "ContainerCreating", "PodInitializing")


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
    workers = sorted(map(_worker, pods), key=lambda worker: worker.worker)
    template = deployment["spec"]["template"]["spec"]
    resource, count = _gpus(template)
    return Pool(
        pool=name,
        desired_replicas=deployment["spec"].get("replicas", 1),  # as the API defines it
        ready_replicas=sum(worker.ready for worker in workers),
        workers=tuple(workers),
        observe_time=observe_time,
        gpu_resource=resource,
        gpus_per_worker=count,
        images=tuple(sorted({_image(template), *(worker.image for worker in workers)})),
        problem=_deployment_problem(deployment),
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


def _gpus(template: ApiObject) -> tuple[str, int]:
    """Return the extended resource that containers ask for, such as `nvidia.com/gpu`, and how many of it."""
    for container in template["containers"]:
        for resource, quantity in sorted(container.get("resources", {}).get("limits", {}).items()):
            if "/" in resource:  # the names of Kubernetes' own resources have no domain
                return resource, int(quantity)
    return "", 0


def _deployment_problem(deployment: ApiObject) -> str:
    for condition in deployment.get("status", {}).get("conditions", ()):
        if (condition["type"], condition["status"]) in (("ReplicaFailure", "True"), ("Progressing", "False")):
            return _said(condition)
    return ""


def _pod_problem(pod: ApiObject) -> str:
    """Return why a pod does not answer requests: the first cause in the order in which pods come to life."""
    status = pod["status"]
    conditions = {condition["type"]: condition for condition in status.get("conditions", ())}
    waiting = [_waiting(container) for container in status.get("containerStatuses", ())]
    problem = ""
    if pod["metadata"].get("deletionTimestamp"):
        problem = "Terminating: finishes its requests"
    elif status.get("phase") in ("Failed", "Succeeded"):
        problem = _said({"reason": status["phase"], **status})
    elif conditions.get("PodScheduled", {}).get("status") == "False":
        problem = _said(conditions["PodScheduled"])
    elif any(waiting):
        problem = next(filter(None, waiting))
    elif conditions.get("Ready", {}).get("status") != "True":
        running = status.get("phase") == "Running"
        problem = "NotReady: loads its models, or drains" if running else "Pending: its container is being started"
    return problem


def _waiting(container: ApiObject) -> str:
    waiting = container.get("state", {}).get("waiting", {})
    if waiting.get("reason") in _STARTING:
        return ""
    ended = container.get("lastState", {}).get("terminated")
    cause = f"; it ended with {ended['exitCode']}, {ended.get('reason', 'Error')}" if ended else ""
    return _said(waiting) + cause


def _said(condition: ApiObject) -> str:
    return ": ".join(part for part in (condition.get("reason"), condition.get("message")) if part)


def _image(spec: ApiObject) -> str:
    return str(spec["containers"][0]["image"])


def _pool_label(found: ApiObject) -> str:
    return str(found["metadata"].get("labels", {}).get(POOL_LABEL, ""))
