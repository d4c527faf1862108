import signal
import time
import urllib.request
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from harness.processes import ServiceProcess, service_process
from modelfleet.api.manager.v1 import model_service_pb2 as pb
from modelfleet.api.manager.v1.model_service_pb2_grpc import ModelServiceStub

pytestmark = pytest.mark.slow

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


def until_refused(stub: ModelServiceStub) -> grpc.RpcError:
    """Call until a call fails, and return how."""
    give_up = time.monotonic() + 30
    while time.monotonic() < give_up:
        try:
            stub.GetModel(pb.GetModelRequest(model="new"), timeout=5)
        except grpc.RpcError as error:
            return error
    raise AssertionError("new calls are still taken")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_on_a_signal_watchers_hear_first_then_new_calls_are_refused_and_running_ones_finish(number: int) -> None:
    with (
        service_process("-m", "harness.waiting_server") as service,
        grpc.insecure_channel(f"127.0.0.1:{service.port}", options=[("grpc.enable_retries", 0)]) as channel,
    ):
        stub = ModelServiceStub(channel)
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=60)
        running = stub.GetModel.future(pb.GetModelRequest(model="wait"), timeout=60)
        assert next(watch).status == SERVING
        until_in_flight(service)

        service.process.send_signal(number)
        assert next(watch).status == NOT_SERVING
        # Callers that have not heard yet are still answered.
        assert stub.GetModel(pb.GetModelRequest(model="late"), timeout=5).model.model == "late"
        refused = until_refused(stub)
        assert not running.done()

        service.process.stdin.write("go on\n")
        service.process.stdin.flush()
        assert running.result(timeout=30).model.model == "wait"
        assert service.process.wait(timeout=30) == 0

    assert refused.code() is grpc.StatusCode.UNAVAILABLE


def test_a_server_that_was_told_to_stop_goes_on_serving_before_it_says_otherwise() -> None:
    """
    Who knows it by a name alone finds its successor meanwhile.

    Health says NOT_SERVING at the end, since gRPC looks no name up for that.
    """
    with (
        service_process("-m", "harness.waiting_server", "--drain-delay-s=3") as service,
        grpc.insecure_channel(f"127.0.0.1:{service.port}", options=[("grpc.enable_retries", 0)]) as channel,
    ):
        health = health_pb2_grpc.HealthStub(channel)
        watch = health.Watch(health_pb2.HealthCheckRequest(), timeout=60)
        assert next(watch).status == SERVING

        service.process.terminate()
        until_logged(service, "draining")
        assert health.Check(health_pb2.HealthCheckRequest(), timeout=5).status == SERVING
        assert ModelServiceStub(channel).GetModel(pb.GetModelRequest(model="late"), timeout=5).model.model == "late"

        assert next(watch).status == NOT_SERVING
        assert service.process.wait(timeout=30) == 0


def until_logged(service: ServiceProcess, event: str) -> None:
    """Return once the server has logged an event."""
    give_up = time.monotonic() + 30
    while not any(found["event"] == event for found in service.events):
        assert time.monotonic() < give_up


def until_in_flight(service: ServiceProcess) -> None:
    """Return once the server counts a call under way."""
    give_up = time.monotonic() + 30
    while "modelfleet_rpc_in_flight 1.0" not in metrics(service):
        assert time.monotonic() < give_up


def metrics(service: ServiceProcess) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{service.metrics_port}/metrics", timeout=10) as answer:
        return answer.read().decode()


def test_prometheus_gets_calls_by_method_and_code(tmp_path: Path) -> None:
    flags = ["--host=127.0.0.1", "--port=0", "--metrics-port=0", f"--cache-dir={tmp_path}", "--manager=127.0.0.1:1"]
    with (
        service_process("-m", "modelfleet.tokenizer", *flags) as service,
        grpc.insecure_channel(f"127.0.0.1:{service.port}") as channel,
    ):
        method = "/modelfleet.api.tokenizer.v1.TokenizerService/Tokenize"
        with pytest.raises(grpc.RpcError):
            channel.unary_unary(method)(b"", timeout=10)
        page = metrics(service)

    assert f'modelfleet_rpc_seconds_count{{code="INVALID_ARGUMENT",method="{method}"}} 1.0' in page
    assert 'modelfleet_rejections_total{reason="INVALID_INPUT"} 1.0' in page
    for histogram in (
        "modelfleet_tokenizer_encode_seconds",
        "modelfleet_tokenizer_texts",
        "modelfleet_tokenizer_tokens",
    ):
        assert f"# TYPE {histogram} histogram" in page
    assert "process_resident_memory_bytes" in page
