"""Traces of the three services, as a collector gets them."""

import json
import secrets
from pathlib import Path

import grpc
import pytest
from e2e.conftest import client_of, push
from harness.collector import Span, collecting
from modelfleet.api.inference.v1 import inference_pb2 as pb
from modelfleet.api.inference.v1.inference_pb2_grpc import InferenceServiceStub
from modelfleet_tools.cluster import LocalCluster

pytestmark = pytest.mark.slow

EMBED = "modelfleet.api.inference.v1.InferenceService/Embed"
TOKENIZE = "modelfleet.api.tokenizer.v1.TokenizerService/Tokenize"


def below(parent: Span, spans: list[Span]) -> list[str]:
    return [span.name for span in spans if span.parent_id == parent.span_id]


async def test_a_call_is_one_trace_through_the_services_with_a_span_for_each_stage(
    tmp_path: Path, minilm_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with collecting() as (collector, url):
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", url)
        monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
        async with LocalCluster(tmp_path) as cluster:
            with client_of(cluster) as client:
                push(client, minilm_folder, "minilm")
            trace, caller = secrets.token_bytes(16), secrets.token_bytes(8)
            metadata = (("traceparent", f"00-{trace.hex()}-{caller.hex()}-01"),)
            async with grpc.aio.insecure_channel(cluster.addresses.inference) as channel:
                stub = InferenceServiceStub(channel)
                await stub.Embed(pb.EmbedRequest(model="minilm", texts=["a cat", "a dog"]), metadata=metadata)

                spans = await collector.trace(trace, spans=5)
                embed = next(span for span in spans if span.name == EMBED)
                assert (embed.service, embed.parent_id) == ("modelfleet-inference", caller)
                assert embed.attributes["rpc.grpc.status_code"] == 0
                assert below(embed, spans) == ["tokenize", TOKENIZE, "queue", "run"]
                assert all(embed.start_ns <= span.start_ns <= span.end_ns <= embed.end_ns for span in spans)
                run = spans[-1]
                assert run.attributes["modelfleet.rows"] == 2
                assert next(span for span in spans if span.name == TOKENIZE).service == "modelfleet-tokenizer"

                failing = secrets.token_bytes(16)
                metadata = (("traceparent", f"00-{failing.hex()}-{caller.hex()}-01"),)
                with pytest.raises(grpc.aio.AioRpcError):
                    await stub.Embed(pb.EmbedRequest(model="none", texts=["a"]), metadata=metadata)
                (refused, *_) = await collector.trace(failing, spans=1)
                assert refused.is_error
                assert refused.attributes["modelfleet.reason"] == "MODEL_NOT_FOUND"

            own = {span.trace_id for span in collector.spans if span.name in ("queue", "run", "tokenize")}
            assert own == {trace}  # the worker's own requests make none
        log = [json.loads(line) for line in cluster.log_path("inference").read_text().splitlines()]
        assert failing.hex() in {line.get("trace_id") for line in log}
