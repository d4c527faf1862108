"""`modelfleet demo`: the main job, end to end, on this machine."""

import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from modelfleet.client.client import Client
from modelfleet.runtime.errors import InternalError

from modelfleet_tools.cluster import LocalCluster, Service
from modelfleet_tools.output import tell
from modelfleet_tools.pushing import push_folder
from modelfleet_tools.requests import print_entities
from modelfleet_tools.samples import fetch_sample, find_sample, is_whole
from modelfleet_tools.samples_commands import SAMPLES_FOLDER
from modelfleet_tools.up import DeviceOption

_TEXTS = (
    "My name is Ada Lovelace and I was born in London.",
    "My email is grace.hopper@gmail.com, my phone number is (415) 555-0132.",
    "Ship it to 221B Baker Street, Springfield, IL 62704, please.",
    "The meeting is at noon.",
)
_FILLER = "The quarterly report covers sales, support and hiring in some detail. "
_LONG_TEXT = f"{_FILLER * 60}My name is Alan Turing, my email is alan.turing@gmail.com. {_FILLER * 20}"


def demo(*, device: DeviceOption = "cpu") -> None:
    """
    Start the services, push the sample model, send requests, print the answers, stop.

    Example: modelfleet demo
    """
    sample = find_sample("pii")
    folder = SAMPLES_FOLDER / sample.name
    texts = [*_TEXTS, _LONG_TEXT]
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="modelfleet-demo-") as data_dir, ExitStack() as stack:
        with _step(f"The sample model is in {folder}"):
            if not is_whole(sample, folder):
                fetch_sample(sample, folder)
        with _step("Three services are serving"):
            cluster = stack.enter_context(LocalCluster(Path(data_dir), device=device))
        addresses = cluster.addresses
        for service in Service:
            tell(f"  {service}: {getattr(addresses, service)}, process {cluster.pid(service)}")
        client = stack.enter_context(
            Client(inference=addresses.inference, tokenizer=addresses.tokenizer, manager=addresses.manager)
        )
        with _step("The model is pushed"):
            pushed = push_folder(client, folder, sample.name, "stable", timeout_s=60)
        number = pushed.model_version.model_version
        with _step(f"A worker serves {sample.name}@{number}"):
            served = client.wait_until_served(sample.name, model_version=number, timeout_s=60)
        with _step(f"{len(texts)} texts are answered by {sample.name}@{number} on {', '.join(served.providers)}"):
            answer = client.extract_entities(sample.name, texts, window_stride=32)
        print_entities(texts, answer)
        with _step("All services are stopped"):
            codes = cluster.stop()
    if failed := [name for name, code in codes.items() if code]:
        raise InternalError(f"Not stopped cleanly: {', '.join(failed)}.")
    found = {entity.label for result in answer.results for entity in result.entities}
    if missing := {"GIVEN_NAME", "EMAIL", "PHONE"} - found:
        raise InternalError(f"The model found no {', '.join(sorted(missing))} in texts that have them.")
    tell(f"Done in {time.monotonic() - started:.1f} s. Serve for real: modelfleet up")


@contextmanager
def _step(what: str) -> Iterator[None]:
    started = time.monotonic()
    yield
    tell(f"{time.monotonic() - started:6.1f} s  {what}")
