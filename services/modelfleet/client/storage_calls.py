"""Calls of the manager that care for its storage."""

from collections.abc import Callable
from datetime import timedelta

from modelfleet.api.manager.v1 import storage_service_pb2 as pb
from modelfleet.client.answers import BlobProblem, BlobReport, Garbage
from modelfleet.client.steps import Method, Procedure, Service, ask

_PATH = "/modelfleet.api.manager.v1.StorageService"
COLLECT_GARBAGE = Method(Service.MANAGER, f"{_PATH}/CollectGarbage", pb.CollectGarbageResponse)
CHECK_BLOBS = Method(Service.MANAGER, f"{_PATH}/CheckBlobs", pb.CheckBlobsResponse)


def collect_garbage(
    *, dry_run: bool = False, grace_s: float | None = None, timeout_s: float = 3600
) -> Procedure[Garbage]:
    """
    Delete the blobs that no model version has, or only tell which; `grace_s` replaces the manager's grace period.

    A push that runs for longer than the grace period may fail and have to be made again.
    """
    request = pb.CollectGarbageRequest(dry_run=dry_run)
    if grace_s is not None:
        request.grace_period.FromTimedelta(timedelta(seconds=grace_s))
    response = yield from ask(COLLECT_GARBAGE, request, timeout_s)
    return Garbage({blob.sha256: blob.size for blob in response.blobs}, response.blob_count, response.bytes)


def check_blobs(
    *, repair: bool = False, progress: Callable[[BlobReport], None] | None = None, timeout_s: float = 3600
) -> Procedure[BlobReport]:
    """
    Compare all stored blobs with their digests, page by page, each within `timeout_s`.

    `progress` is called after each page with what was found so far. `repair` deletes what is of no use: corrupt bytes,
    which the next push of the bundle sends again, and what no model version has.
    """
    report = BlobReport((), 0, 0)
    token = ""
    while True:
        page = yield from ask(CHECK_BLOBS, pb.CheckBlobsRequest(page_token=token, repair=repair), timeout_s)
        report = BlobReport(
            (*report.problems, *map(_problem, page.problems)),
            report.checked_blobs + page.checked_blobs,
            report.checked_bytes + page.checked_bytes,
        )
        if progress:
            progress(report)
        if not page.next_page_token:
            return report
        token = page.next_page_token


def _problem(problem: pb.BlobProblem) -> BlobProblem:
    return BlobProblem(
        kind=pb.BlobProblemKind.Name(problem.kind).removeprefix("BLOB_PROBLEM_KIND_"),
        sha256=problem.sha256,
        detail=problem.detail,
        model_versions=tuple(problem.model_versions),
        repaired=problem.repaired,
    )
