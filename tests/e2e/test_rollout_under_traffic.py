"""A canary on a real worker, judged by what its callers got."""

import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from e2e.conftest import Serving
from modelfleet.bundle.directory import open_directory
from modelfleet.client import Client
from modelfleet.runtime.errors import InvalidInputError
from onnx import TensorProto, helper

pytestmark = pytest.mark.slow

NAME = "lookup"


def write_lookup(folder: Path, size: int) -> None:
    """Write a model that looks numbers up in a list of `size`, and fails on any beyond its end."""
    table = helper.make_tensor("table", TensorProto.FLOAT, [size], np.arange(size, dtype=np.float32))
    number = helper.make_tensor_value_info("number", TensorProto.INT64, ["n"])
    value = helper.make_tensor_value_info("value", TensorProto.FLOAT, ["n"])
    node = helper.make_node("Gather", ["table", "number"], ["value"])
    graph = helper.make_graph([node], "lookup", [number], [value], [table])
    folder.mkdir()
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, folder / "model.onnx")


def ask(client: Client, **options: str) -> bool:
    """Return whether the number 50 was found."""
    try:
        client.infer(NAME, {"number": np.array([50], np.int64)}, **options)
    except InvalidInputError:
        return False
    return True


def test_a_canary_that_fails_its_callers_is_taken_back_by_itself(serving: Serving, tmp_path: Path) -> None:
    client = serving.client
    for size, alias in ((100, "stable"), (10, "")):
        write_lookup(tmp_path / f"{size}", size)
        client.push(*open_directory(tmp_path / f"{size}"), NAME, alias=alias)
    client.wait_until_served(NAME)
    rollout = client.start_rollout(NAME, 2, canary_percents=[25], min_requests=40, max_error_rate=0.1)
    deadline = time.monotonic() + 60
    while (found := client.get_rollout(rollout.rollout)).state in ("PENDING", "LOADING"):
        assert time.monotonic() < deadline, found
    while ask(client):  # the worker follows the manager a moment later
        assert time.monotonic() < deadline

    by_user = {user: [ask(client, affinity_key=user) for _ in range(2)] for user in map(str, range(40))}
    answers = [ask(client) for _ in range(200)]
    while not (found := client.get_rollout(rollout.rollout)).is_over:
        assert time.monotonic() < deadline, found
    after = [ask(client) for _ in range(50)]

    assert all(first == second for first, second in by_user.values())  # nobody gets now this version, now that
    assert 0 < sum(first for first, _ in by_user.values()) < 40
    assert answers[:8].count(False) == 2
    assert found.state == "FAILED"
    assert "max_error_rate is 10.00%" in found.reason
    assert all(after)
    client.delete_alias(NAME, "stable")
