"""Each service killed with -9: callers are told, nothing stored is lost, and it works again after the restart."""

import json
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from e2e.conftest import Serving, client_of, push
from modelfleet.client import Client
from modelfleet.runtime.errors import ManagerUnreachableError, TokenizerUnreachableError, UnavailableError
from modelfleet_tools.cluster import LocalCluster, Service

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory, pii_folder: Path) -> Iterator[Serving]:
    with LocalCluster(tmp_path_factory.mktemp("cluster")) as cluster, client_of(cluster) as client:
        push(client, pii_folder, "pii")
        yield Serving(cluster, client)


def kill(cluster: LocalCluster, service: Service) -> None:
    cluster.kill(service, signal.SIGKILL)
    assert cluster.wait_for_exit(service) == -signal.SIGKILL


def answers(client: Client) -> bool:
    (result,) = client.extract_entities("pii", ["My name is Ada Lovelace."]).results
    return [entity.text for entity in result.entities] == ["Ada", "Lovelace"]


def test_without_a_tokenizer_callers_get_unavailable_within_their_deadline_and_ids_still_work(serving: Serving) -> None:
    kill(serving.cluster, Service.TOKENIZER)
    started = time.monotonic()
    with (
        client_of(serving.cluster, timeout_s=10) as client,
        pytest.raises(TokenizerUnreachableError, match="tokenizer service cannot be reached") as raised,
    ):
        client.extract_entities("pii", ["My name is Ada Lovelace."])
    assert raised.value.retry_after_s == 1.0
    assert time.monotonic() - started < 10

    serving.cluster.restart(Service.TOKENIZER)

    assert answers(serving.client)


def test_without_a_manager_workers_answer_and_what_was_pushed_is_there_after_its_restart(
    serving: Serving, pii_folder: Path
) -> None:
    before = serving.client.models()
    kill(serving.cluster, Service.MANAGER)
    assert answers(serving.client)
    with (
        client_of(serving.cluster, timeout_s=5) as client,
        pytest.raises(ManagerUnreachableError, match="manager cannot be reached"),
    ):
        client.embed("never-pushed", ["text"])  # only the manager knows whether it exists

    serving.cluster.restart(Service.MANAGER)

    assert serving.client.models() == before
    push(serving.client, pii_folder, "pii-again")
    assert answers(serving.client)


def test_a_worker_that_was_killed_serves_its_last_assignment_without_manager_or_download(serving: Serving) -> None:
    kill(serving.cluster, Service.MANAGER)
    kill(serving.cluster, Service.INFERENCE)
    with client_of(serving.cluster, timeout_s=2) as client, pytest.raises(UnavailableError):
        answers(client)

    serving.cluster.restart(Service.INFERENCE)

    assert answers(serving.client)
    serving.cluster.restart(Service.MANAGER)
    assert answers(serving.client)


def test_a_model_that_nobody_has_asked_before_is_answered_without_a_manager(
    serving: Serving, pii_folder: Path, tmp_path: Path
) -> None:
    other = shutil.copytree(pii_folder, tmp_path / "pii")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    (other / "tokenizer.json").write_text(json.dumps(tokenizer, indent=1))  # another digest, the same tokens
    push(serving.client, other, "pii-unasked")
    kill(serving.cluster, Service.MANAGER)
    kill(serving.cluster, Service.INFERENCE)
    kill(serving.cluster, Service.TOKENIZER)
    serving.cluster.restart(Service.TOKENIZER)
    serving.cluster.restart(Service.INFERENCE)

    (result,) = serving.client.extract_entities("pii-unasked", ["My name is Ada Lovelace."]).results

    assert [entity.text for entity in result.entities] == ["Ada", "Lovelace"]
    serving.cluster.restart(Service.MANAGER)


def test_a_cluster_started_again_on_its_data_serves_what_it_served(tmp_path: Path, pii_folder: Path) -> None:
    with LocalCluster(tmp_path) as cluster, client_of(cluster) as client:
        push(client, pii_folder, "pii")
    with LocalCluster(tmp_path) as cluster, client_of(cluster) as client:
        client.wait_until_served("pii", timeout_s=30)
        assert answers(client)
