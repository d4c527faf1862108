"""ONNX Runtime: one session of one graph on one device. All that the project knows of `onnxruntime` is in this file."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import structlog
from onnx import TensorProto, helper
from onnxruntime.capi.onnxruntime_pybind11_state import EPFail, InvalidArgument

from modelfleet.inference.tensor_spec import Array, TensorSpec
from modelfleet.runtime.errors import (
    FatalDeviceError,
    InsufficientMemoryError,
    InvalidBundleError,
    OverloadedError,
    ProviderUnavailableError,
)

_log = structlog.get_logger()


class Device(StrEnum):
    """What sessions run on."""

    CPU = "cpu"
    CUDA = "cuda"
    TENSORRT = "tensorrt"


# In order of preference. The CPU follows a GPU's provider because it runs the few shape computations that belong there.
_PROVIDERS = {
    Device.CPU: ("CPUExecutionProvider",),
    Device.CUDA: ("CUDAExecutionProvider", "CPUExecutionProvider"),
    Device.TENSORRT: ("TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"),
}

# Operators that a GPU's provider must take itself. The rest may run on a CPU beside it: they compute shapes, mostly.
# https://github.com/microsoft/onnxruntime/blob/main/onnxruntime/core/framework/fallback_cpu_capability.cc
_COSTLY = frozenset(
    {
        *("MatMul", "Gemm", "FusedMatMul", "FusedGemm", "MatMulInteger", "MatMulIntegerToFloat", "MatMulNBits"),
        *("Conv", "FusedConv", "ConvInteger", "ConvTranspose", "QLinearConv", "QLinearMatMul", "QGemm"),
        *("Attention", "MultiHeadAttention", "GroupQueryAttention", "QAttention", "PackedAttention"),
        *("DynamicQuantizeMatMul", "LSTM", "GRU", "RNN"),
    }
)

# What the CUDA runtime, cuBLAS and cuDNN say after which "the process must be terminated and relaunched":
# https://docs.nvidia.com/cuda/cuda-runtime-api/group__CUDART__TYPES.html
_FATAL = re.compile(
    r"illegal memory access|illegal instruction|launch failure|misaligned address|invalid program counter|"
    r"hardware stack error|uncorrectable|device-side assert|device is lost|(device|GPU) has fallen off|"
    r"operation not supported on global/shared address space|launch timed out|busy or unavailable|"
    r"driver shutting down|CUDA failure (46|214|220|700|702|71[0-9]|999)\b|"
    r"(CUBLAS|CUDNN)_STATUS_(EXECUTION_FAILED|INTERNAL_ERROR|NOT_INITIALIZED|ARCH_MISMATCH)",
    re.IGNORECASE,
)
_OUT_OF_MEMORY = re.compile(
    r"out of memory|failed to allocate memory|CUDA failure 2\b|bad_alloc|BFCArena|CUBLAS_STATUS_ALLOC_FAILED|"
    r"CUDNN_STATUS_ALLOC_FAILED",
    re.IGNORECASE,
)

RefusedInputs = InvalidArgument
"""What a run raises where an operator cannot take the values or the shapes that reach it."""

_DTYPES: Mapping[str, np.dtype[Any]] = {
    "tensor(float)": np.dtype(np.float32),
    "tensor(float16)": np.dtype(np.float16),
    "tensor(double)": np.dtype(np.float64),
    "tensor(int8)": np.dtype(np.int8),
    "tensor(int16)": np.dtype(np.int16),
    "tensor(int32)": np.dtype(np.int32),
    "tensor(int64)": np.dtype(np.int64),
    "tensor(uint8)": np.dtype(np.uint8),
    "tensor(uint16)": np.dtype(np.uint16),
    "tensor(uint32)": np.dtype(np.uint32),
    "tensor(uint64)": np.dtype(np.uint64),
    "tensor(bool)": np.dtype(np.bool_),
    "tensor(string)": np.dtype(np.object_),
}


@dataclass(frozen=True, slots=True)
class SessionOptions:
    """How sessions of this worker are made."""

    device: Device
    device_id: int
    threads: int
    """CPU threads that one run uses, for the CPU provider."""
    device_memory_bytes: int
    """Most memory that a session's arena may take on a GPU; 0 for no limit."""
    engine_cache: Path = Path()
    """Where TensorRT keeps the engines that it has built: the graph's own place."""


class RunCancellation:
    """Stops a run through `RunOptions.terminate`, which ONNX Runtime looks at between two nodes of the graph."""

    def __init__(self) -> None:
        self.run_options = ort.RunOptions()
        self.run_options.log_severity_level = 4  # what fails is raised; ONNX Runtime would also print it

    def cancel(self) -> None:
        """Stop the run soon."""
        self.run_options.terminate = True


class Session:
    """
    A graph, loaded on a device.

    Raises InvalidBundleError when ONNX Runtime refuses the graph and ProviderUnavailableError when the device that was
    asked for is not there: it never runs on another one instead.
    """

    def __init__(self, graph: Path, options: SessionOptions) -> None:
        wanted = _PROVIDERS[options.device]
        _require_in_build(options.device, wanted[0])
        try:
            self._session = ort.InferenceSession(
                str(graph), _session_options(options), providers=_configured(wanted, options)
            )
        except Exception as error:
            if _OUT_OF_MEMORY.search(str(error)):
                raise InsufficientMemoryError(
                    f"{graph.name!r} does not fit into the memory that is left: {_first_line(error)}"
                ) from error
            if is_fatal(error, options.device):
                raise _fatal() from error
            raise InvalidBundleError(
                f"ONNX Runtime refuses {graph.name!r}: {_first_line(error)}", field="model"
            ) from error
        self.graph = graph
        self.device = options.device
        self._session.disable_fallback()
        self.providers: tuple[str, ...] = tuple(self._session.get_providers())
        if wanted[0] not in self.providers:
            raise _not_started(options.device, f"there is only {', '.join(self.providers)}")
        self._require_on_device(options.device)
        self.inputs = tuple(_spec(node) for node in self._session.get_inputs())
        self.outputs = tuple(_spec(node) for node in self._session.get_outputs())

    def run(self, inputs: Mapping[str, Array], names: Sequence[str], cancellation: RunCancellation) -> list[Array]:
        """
        Return the named outputs.

        Raises FatalDeviceError, OverloadedError for lack of memory, or else whatever ONNX Runtime raises: RefusedInputs
        may be the caller's fault.
        """
        try:
            outputs: list[Array] = self._session.run(list(names), dict(inputs), cancellation.run_options)
        except Exception as error:
            if failure := device_failure(error, self.device):
                raise failure from error
            raise
        return outputs

    def _require_on_device(self, device: Device) -> None:
        """Refuse a graph of which the GPU's provider has left costly operators to the CPU, silently and slowly."""
        if device is Device.CPU:
            return
        assigned = self._session.get_provider_graph_assignment_info()
        on_cpu = Counter(
            node.op_type for part in assigned if part.ep_name == "CPUExecutionProvider" for node in part.get_nodes()
        )
        if costly := sorted(_COSTLY & on_cpu.keys()):
            found = ", ".join(f"{on_cpu[operator]} {operator}" for operator in costly)
            raise ProviderUnavailableError(
                f"{self.providers[0]} was asked for and would leave {found} of this graph to the CPU. "
                "Export it with operators that the provider has, or set --device cpu."
            )
        if on_cpu:
            _log.info("operators on the CPU", operators=dict(on_cpu))


def require_device(options: SessionOptions) -> None:
    """
    Raise ProviderUnavailableError unless sessions can run on the device.

    Being in ONNX Runtime's build is not enough: without a GPU, a driver or a library of it, a provider fails only when
    a session is made. So one is made, of the smallest graph that there is.
    """
    if options.device is Device.CPU:
        return
    wanted = _PROVIDERS[options.device]
    _require_in_build(options.device, wanted[0])
    try:
        session = ort.InferenceSession(
            _smallest_graph(), _session_options(options), providers=_configured(wanted, options)
        )
    except Exception as error:
        raise _not_started(options.device, _first_line(error)) from error
    if wanted[0] not in (given := session.get_providers()):
        raise _not_started(options.device, f"there is only {', '.join(given)}")


def is_fatal(error: Exception, device: Device) -> bool:
    """Return whether what ONNX Runtime raised means that nothing will run on the device any more."""
    return device is not Device.CPU and (isinstance(error, EPFail) or bool(_FATAL.search(str(error))))


def device_failure(error: Exception, device: Device) -> OverloadedError | FatalDeviceError | None:
    """Return what callers are told where a run failed for the device's sake; None where the run is at fault."""
    if _OUT_OF_MEMORY.search(str(error)):
        return OverloadedError("The worker's memory is full. Retry later, or send less at once.")
    return _fatal() if is_fatal(error, device) else None


def _fatal() -> FatalDeviceError:
    return FatalDeviceError("The device of this worker no longer works. Retry; another replica answers.")


def _not_started(device: Device, problem: str) -> ProviderUnavailableError:
    return ProviderUnavailableError(
        f"{_PROVIDERS[device][0]} was asked for (--device {device.value}) and could not start: {problem}. "
        "Check the GPU, its driver and the worker's libraries (on Kubernetes, the pool's runtimeClassName), or set "
        "--device cpu."
    )


def _smallest_graph() -> bytes:
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "smallest", [x], [y])
    model = helper.make_model(graph, ir_version=9, opset_imports=[helper.make_opsetid("", 18)])
    return bytes(model.SerializeToString())


def _require_in_build(device: Device, provider: str) -> None:
    if device is not Device.CPU and hasattr(ort, "preload_dlls"):
        ort.preload_dlls()  # finds CUDA and cuDNN in the wheels of the [inference-gpu] extra
    available = ort.get_available_providers()
    if provider not in available:
        raise ProviderUnavailableError(
            f"{provider} was asked for (--device {device.value}), but this build of ONNX Runtime has only "
            f"{', '.join(available)}. Install modelfleet[inference-gpu], or set --device cpu."
        )


def _configured(providers: Sequence[str], options: SessionOptions) -> list[tuple[str, dict[str, str]]]:
    cuda = {
        "device_id": str(options.device_id),
        # Grow by what is asked for, not by powers of two: what one model takes is not there for the next.
        "arena_extend_strategy": "kSameAsRequested",
    }
    if options.device_memory_bytes:
        cuda["gpu_mem_limit"] = str(options.device_memory_bytes)
    settings = {
        "CUDAExecutionProvider": cuda,
        "TensorrtExecutionProvider": {
            "device_id": str(options.device_id),
            "trt_engine_cache_enable": "1",
            "trt_engine_cache_path": str(options.engine_cache),
        },
    }
    return [(provider, settings.get(provider, {})) for provider in providers]


def _session_options(options: SessionOptions) -> ort.SessionOptions:
    session_options = ort.SessionOptions()
    session_options.log_severity_level = 3
    session_options.intra_op_num_threads = options.threads
    session_options.inter_op_num_threads = 1
    # Shapes differ from batch to batch; a memory plan for each shape ever seen would only pile up.
    session_options.enable_mem_pattern = False
    # Threads spin while a run lasts, which its many short loops need, and sleep as soon as it ends: the CPU is then
    # for tokenizing and for the calls.
    session_options.add_session_config_entry("session.force_spinning_stop", "1")
    if options.device is not Device.CPU:
        session_options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    return session_options


def _spec(node: Any) -> TensorSpec:
    if node.type not in _DTYPES:
        raise InvalidBundleError(
            f"The graph's {node.name!r} is a {node.type}, which cannot be served. Use {', '.join(_DTYPES)}.",
            field="model",
        )
    shape = tuple(size if isinstance(size, int) and size >= 0 else None for size in node.shape)
    return TensorSpec(node.name, _DTYPES[node.type], shape)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
