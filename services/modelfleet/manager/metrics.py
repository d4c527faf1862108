"""What Prometheus is told of the manager, read at each scrape, in the scrape's own thread."""

from collections import Counter
from collections.abc import Iterable, Iterator

import structlog
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from sqlalchemy import func, select
from sqlalchemy.exc import SQLAlchemyError

from modelfleet.manager.rollout_states import RolloutState
from modelfleet.manager.store.database import Database
from modelfleet.manager.store.tables import BlobRow, ModelRow, ModelVersionRow, RolloutRow
from modelfleet.manager.workers import Workers
from modelfleet.runtime.errors import ModelfleetError

_log = structlog.get_logger()


class ManagerCollector(Collector):
    """Sizes of the registry, and the states that workers report."""

    def __init__(self, database: Database, workers: Workers) -> None:
        self._database = database
        self._workers = workers

    def collect(self) -> Iterable[Metric]:
        """Return the gauges; none while the database is away, which must not take the process's other metrics along."""
        try:
            return list(self._read())
        except (ModelfleetError, SQLAlchemyError) as error:
            _log.warning("metrics of the registry not read", error=str(error))
            return []

    def _read(self) -> Iterator[Metric]:
        with self._database.reading() as session:
            models = session.scalar(select(func.count()).select_from(ModelRow))
            versions = session.scalar(select(func.count()).select_from(ModelVersionRow))
            by_state = select(RolloutRow.state, func.count()).group_by(RolloutRow.state)
            rollouts = {state: count for state, count in session.execute(by_state)}  # noqa: C416  rows are no pairs
            size = session.scalar(select(func.coalesce(func.sum(BlobRow.size), 0)))
        yield GaugeMetricFamily("modelfleet_manager_models", "Registered models.", models)
        yield GaugeMetricFamily("modelfleet_manager_model_versions", "Registered model versions.", versions)
        yield GaugeMetricFamily("modelfleet_manager_blob_bytes", "Bytes of all stored blobs.", size)
        counted = GaugeMetricFamily("modelfleet_manager_rollouts", "Rollouts, by state.", labels=["state"])
        for name in RolloutState:
            counted.add_metric([name], rollouts.get(name, 0))
        yield counted
        reports = self._workers.current()
        workers = GaugeMetricFamily("modelfleet_manager_workers", "Workers that report.", labels=["pool"])
        for pool, count in Counter(report.pool for report in reports).items():
            workers.add_metric([pool], count)
        yield workers
        states = GaugeMetricFamily(
            "modelfleet_manager_worker_versions", "Model versions on workers, by state.", labels=["pool", "state"]
        )
        held = Counter((report.pool, version.state) for report in reports for version in report.versions)
        for (pool, state), count in held.items():
            states.add_metric([pool, state], count)
        yield states
