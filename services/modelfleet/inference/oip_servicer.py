"""GRPCInferenceService of the Open Inference Protocol: from its messages to the pipeline and back."""

import asyncio
import functools
from collections.abc import Iterator
from importlib.metadata import version as package_version
from typing import Any, TypeAlias

import grpc

from modelfleet.api.oip.v2 import model_config_pb2, open_inference_pb2_grpc
from modelfleet.api.oip.v2 import open_inference_pb2 as pb
from modelfleet.bundle.reference import ModelReference
from modelfleet.client.datatypes import datatype
from modelfleet.inference import oip_models
from modelfleet.inference.assignment import VersionKey
from modelfleet.inference.models import HeldModel
from modelfleet.inference.oip_classification import classified
from modelfleet.inference.oip_parameters import check_inputs, read_parameters
from modelfleet.inference.oip_tensors import (
    read_inputs,
    takes_long_to_read,
    wanted_outputs,
    write_outputs,
    write_usage,
)
from modelfleet.inference.pipeline import Pipeline
from modelfleet.inference.served_models import ServedModels, ServedVersion
from modelfleet.inference.servicer import deadline
from modelfleet.inference.states import VersionState
from modelfleet.inference.statistics import Duration
from modelfleet.inference.tensor_spec import TensorSpec
from modelfleet.runtime.errors import ModelfleetError

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
_PLATFORM = "onnxruntime_onnx"  # the name that Triton's clients know
_BACKEND = "onnxruntime"


class OpenInferenceServicer(open_inference_pb2_grpc.GRPCInferenceServiceServicer):
    """Translates; the pipeline answers."""

    def __init__(self, pipeline: Pipeline, served: ServedModels, max_batch: int) -> None:
        self._pipeline = pipeline
        self._served = served
        self._max_batch = max_batch
        self.live = True
        """What ServerLive says."""
        self.ready = False
        """What ServerReady says."""

    async def ServerLive(self, request: pb.ServerLiveRequest, context: Context) -> pb.ServerLiveResponse:
        del request, context
        return pb.ServerLiveResponse(live=self.live)

    async def ServerReady(self, request: pb.ServerReadyRequest, context: Context) -> pb.ServerReadyResponse:
        del request, context
        return pb.ServerReadyResponse(ready=self.ready)

    async def ModelReady(self, request: pb.ModelReadyRequest, context: Context) -> pb.ModelReadyResponse:
        del context
        reference = _reference(request.name, request.version)
        try:
            version = await self._pipeline.look_up(reference)
        except ModelfleetError:
            return pb.ModelReadyResponse(ready=False)
        return pb.ModelReadyResponse(ready=version.state is VersionState.READY)  # evicted or not: it would answer

    async def ServerMetadata(self, request: pb.ServerMetadataRequest, context: Context) -> pb.ServerMetadataResponse:
        del request, context
        return pb.ServerMetadataResponse(
            name="modelfleet",
            version=package_version("modelfleet"),
            extensions=["classification", "model_configuration", "statistics"],
        )

    async def ModelMetadata(self, request: pb.ModelMetadataRequest, context: Context) -> pb.ModelMetadataResponse:
        del context
        key, model = await self._described(_reference(request.name, request.version))
        seen = oip_models.signature(model)
        ready = [held for held in self._served.versions() if held.state is VersionState.READY]
        return pb.ModelMetadataResponse(
            name=request.name,
            versions=[str(held.key.model_version) for held in ready if held.key.model == key.model],
            platform=_PLATFORM,
            inputs=[_metadata(spec) for spec in seen.inputs],
            outputs=[_metadata(spec) for spec in seen.outputs],
        )

    async def ModelConfig(self, request: pb.ModelConfigRequest, context: Context) -> pb.ModelConfigResponse:
        del context
        key, model = await self._described(_reference(request.name, request.version))
        return pb.ModelConfigResponse(config=self._config(key, model))

    async def ModelStatistics(self, request: pb.ModelStatisticsRequest, context: Context) -> pb.ModelStatisticsResponse:
        del context
        if request.name:
            named = await self._pipeline.look_up(_reference(request.name, request.version))
            of_model = [held for held in self._served.versions() if held.key.model == named.key.model]
            wanted = [named] if request.version else of_model
        else:
            wanted = self._served.versions()
        return pb.ModelStatisticsResponse(model_stats=[stats for held in wanted for stats in _statistics(held)])

    async def ModelInfer(self, request: pb.ModelInferRequest, context: Context) -> pb.ModelInferResponse:
        reference = _reference(request.model_name, request.model_version)
        check_inputs(request)
        read = functools.partial(read_inputs, request)
        inputs = await asyncio.to_thread(read) if takes_long_to_read(request) else read()
        async with self._pipeline.held(reference) as (key, model):
            seen = oip_models.signature(model)
            wanted = wanted_outputs(request, seen.outputs)
            parameters = read_parameters(request, model.manifest.task, deadline(context))
            # By number from here on, so that one version answers even if the alias moves meanwhile.
            version, outputs, usage = await oip_models.infer(
                self._pipeline, _pinned(key), model.manifest.task, inputs, parameters
            )
            outputs = classified(outputs, wanted, model)
        response = pb.ModelInferResponse(
            model_name=request.model_name, model_version=str(version.model_version), id=request.id
        )
        # A request without data of either kind cannot tell how it wants its answer: raw is what all clients read.
        raw = bool(request.raw_input_contents) or not request.inputs
        write_outputs(response, outputs, list(wanted), raw=raw)
        write_usage(response, usage)
        return response

    async def _described(self, reference: ModelReference) -> tuple[VersionKey, HeldModel]:
        """Return the model to describe. Only its graph knows its tensors, so one that is evicted is loaded for that."""
        version = await self._pipeline.look_up(reference)
        if version.state is VersionState.READY and version.model:
            return version.key, version.model
        async with self._pipeline.held(_pinned(version.key)) as held:
            return held

    def _config(self, key: VersionKey, model: HeldModel) -> model_config_pb2.ModelConfig:
        seen = oip_models.signature(model)
        first = 1 if seen.batches else 0  # dims do not tell of the batch
        return model_config_pb2.ModelConfig(
            name=key.model,
            platform=_PLATFORM,
            backend=_BACKEND,
            max_batch_size=self._max_batch if seen.batches else 0,
            input=[
                model_config_pb2.ModelInput(name=spec.name, data_type=_data_type(spec), dims=_shape(spec)[first:])
                for spec in seen.inputs
            ],
            output=[
                model_config_pb2.ModelOutput(name=spec.name, data_type=_data_type(spec), dims=_shape(spec)[first:])
                for spec in seen.outputs
            ],
            version_policy=model_config_pb2.ModelVersionPolicy(
                specific=model_config_pb2.ModelVersionPolicy.Specific(versions=[key.model_version])
            ),
            dynamic_batching=model_config_pb2.ModelDynamicBatching() if seen.batches else None,
            default_model_filename=model.manifest.model,
        )


def _reference(name: str, version: str) -> ModelReference:
    """Read the protocol's pair of name and version; an empty version is the alias `stable`, or what the name says."""
    return ModelReference.parse(f"{name}@{version}" if version else name, field="model_name")


def _pinned(key: VersionKey) -> ModelReference:
    return ModelReference(key.model, None, key.model_version)


def _shape(spec: TensorSpec) -> list[int]:
    return [-1 if size is None else size for size in spec.shape]


def _metadata(spec: TensorSpec) -> pb.ModelMetadataResponse.TensorMetadata:
    return pb.ModelMetadataResponse.TensorMetadata(name=spec.name, datatype=datatype(spec.dtype), shape=_shape(spec))


def _data_type(spec: TensorSpec) -> "model_config_pb2.DataType.ValueType":
    name = datatype(spec.dtype)
    return model_config_pb2.DataType.Value(f"TYPE_{'STRING' if name == 'BYTES' else name}")


def _statistics(held: ServedVersion) -> Iterator[pb.ModelStatistics]:
    if held.model is None:
        return
    record = held.model.record
    with record.lock:
        yield pb.ModelStatistics(
            name=held.key.model,
            version=str(held.key.model_version),
            last_inference=int(record.last_ended * 1000),
            inference_count=record.rows,
            execution_count=sum(batch.run.count for batch in record.batches.values()),
            inference_stats=pb.InferStatistics(
                success=_duration(record.success),
                fail=_duration(record.fail),
                queue=_duration(record.queue),
                compute_input=_duration(record.collate),
                compute_infer=_duration(record.run),
                compute_output=_duration(record.reduce),
            ),
            batch_stats=[
                pb.InferBatchStatistics(
                    batch_size=size,
                    compute_input=_duration(batch.collate),
                    compute_infer=_duration(batch.run),
                    compute_output=_duration(batch.reduce),
                )
                for size, batch in sorted(record.batches.items())
            ],
        )


def _duration(duration: Duration) -> pb.StatisticDuration:
    return pb.StatisticDuration(count=duration.count, ns=int(duration.total_s * 1e9))
