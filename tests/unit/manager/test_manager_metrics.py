from modelfleet.manager.metrics import ManagerCollector
from modelfleet.manager.store.database import Database
from modelfleet.manager.workers import Workers
from prometheus_client import CollectorRegistry, Counter, generate_latest


def test_a_database_that_is_away_takes_no_other_metrics_with_it(database: Database) -> None:
    metrics = CollectorRegistry()
    Counter("calls", "Calls.", registry=metrics).inc()
    metrics.register(ManagerCollector(database, Workers(database, ttl_s=60)))
    assert b"modelfleet_manager_models 0.0" in generate_latest(metrics)

    database.close()

    page = generate_latest(metrics)
    assert b"calls_total 1.0" in page
    assert b"modelfleet_manager" not in page
