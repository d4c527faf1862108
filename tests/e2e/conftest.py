"""The three services as three processes, with the sample models."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from modelfleet.bundle.directory import open_directory
from modelfleet.client import Client
from modelfleet_tools.cluster import LocalCluster
from modelfleet_tools.samples import fetch_sample, find_sample, is_whole

SAMPLES = Path(__file__).parents[2] / ".cache" / "samples"


def sample_folder(name: str) -> Path:
    """Return a sample's folder, fetched when it is not there."""
    folder = SAMPLES / name
    sample = find_sample(name)
    if not is_whole(sample, folder):
        fetch_sample(sample, folder)
    return folder


@dataclass(frozen=True)
class Serving:
    """A running cluster and a client of it."""

    cluster: LocalCluster
    client: Client


@pytest.fixture(scope="session")
def minilm_folder() -> Path:
    return sample_folder("minilm")


@pytest.fixture(scope="session")
def pii_folder() -> Path:
    return sample_folder("pii")


@pytest.fixture(scope="session")
def serving(tmp_path_factory: pytest.TempPathFactory, minilm_folder: Path, pii_folder: Path) -> Iterator[Serving]:
    """A cluster that serves `minilm` and `pii`; tests leave it as they found it."""
    with LocalCluster(tmp_path_factory.mktemp("cluster")) as cluster, client_of(cluster) as client:
        for name, folder in (("minilm", minilm_folder), ("pii", pii_folder)):
            push(client, folder, name)
        yield Serving(cluster, client)


def client_of(cluster: LocalCluster, **settings: float) -> Client:
    addresses = cluster.addresses
    return Client(inference=addresses.inference, tokenizer=addresses.tokenizer, manager=addresses.manager, **settings)


def push(client: Client, folder: Path, name: str) -> None:
    """Push a folder as `name@stable` and wait until it is served."""
    bundle, paths = open_directory(folder)
    client.push(bundle, paths, name, alias="stable")
    client.wait_until_served(name, timeout_s=60)
