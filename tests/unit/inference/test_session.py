from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from harness import graphs
from modelfleet.inference.session import Device, RunCancellation, Session, is_fatal
from modelfleet.inference.tensor_spec import TensorSpec
from modelfleet.runtime.errors import InvalidBundleError, ProviderUnavailableError
from onnx import ModelProto, TensorProto, helper
from onnxruntime.capi.onnxruntime_pybind11_state import EPFail


def saved(graph: ModelProto, directory: Path) -> Path:
    path = directory / "model.onnx"
    path.write_bytes(graph.SerializeToString())
    return path


def test_a_session_describes_its_graph_and_runs_it(tmp_path: Path) -> None:
    session = Session(saved(graphs.two_inputs(), tmp_path), graphs.cpu_options(tmp_path))
    assert session.inputs == (
        TensorSpec("a", np.dtype(np.float32), (None, 2)),
        TensorSpec("b", np.dtype(np.int64), (None, 2)),
    )
    assert [spec.name for spec in session.outputs] == ["sum", "difference"]
    assert session.providers == ("CPUExecutionProvider",)
    inputs = {"a": np.array([[1, 2]], np.float32), "b": np.array([[3, 4]])}
    (difference,) = session.run(inputs, ["difference"], RunCancellation())
    assert difference.tolist() == [[-2, -2]]


@pytest.mark.parametrize(
    ("device", "provider"),
    [(Device.CUDA, "CUDAExecutionProvider"), (Device.TENSORRT, "TensorrtExecutionProvider")],
)
def test_a_provider_that_is_not_in_the_build_is_named(tmp_path: Path, device: Device, provider: str) -> None:
    if provider in onnxruntime.get_available_providers():
        pytest.skip("this build has it")
    options = replace(graphs.cpu_options(tmp_path), device=device)
    with pytest.raises(ProviderUnavailableError, match=rf"^{provider} was asked for .*has only .*CPU"):
        Session(saved(graphs.affine(), tmp_path), options)


def test_a_corrupt_graph_is_refused(tmp_path: Path) -> None:
    graph = tmp_path / "model.onnx"
    graph.write_bytes(graphs.affine().SerializeToString()[:40])
    with pytest.raises(InvalidBundleError, match=r"ONNX Runtime refuses 'model\.onnx'"):
        Session(graph, graphs.cpu_options(tmp_path))


def test_a_graph_of_a_type_that_numpy_lacks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidBundleError, match=r"'x' is a tensor\(bfloat16\), which cannot be served"):
        Session(saved(graphs.echo(TensorProto.BFLOAT16), tmp_path), graphs.cpu_options(tmp_path))


def test_a_graph_that_returns_no_tensor_is_refused(tmp_path: Path) -> None:
    sequence = helper.make_sequence_type_proto(helper.make_tensor_type_proto(TensorProto.FLOAT, None))
    graph = helper.make_graph(
        [helper.make_node("SequenceConstruct", ["x"], ["y"])],
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])],
        [helper.make_value_info("y", sequence)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    with pytest.raises(InvalidBundleError, match=r"'y' is a seq\(tensor\(float\)\), which cannot be served"):
        Session(saved(model, tmp_path), graphs.cpu_options(tmp_path))


def test_a_run_that_was_cancelled_before_it_began_ends_at_once(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    session = Session(saved(graphs.slow(), tmp_path), graphs.cpu_options(tmp_path))
    cancellation = RunCancellation()
    cancellation.cancel()
    with pytest.raises(Exception, match="terminate flag"):
        session.run({"x": np.array([[1e12]], np.float32)}, ["y"], cancellation)
    assert capfd.readouterr().err == ""  # the log is JSON lines; ONNX Runtime writes none into it


@pytest.mark.parametrize(
    ("message", "fatal"),
    [
        ("CUDA failure 700: an illegal memory access was encountered ; GPU=0 ; hostname=w", True),
        ("CUDA failure 719: unspecified launch failure ; GPU=0", True),
        ("CUBLAS failure 13: CUBLAS_STATUS_EXECUTION_FAILED ; GPU=0", True),
        ("CUDNN failure 5000: CUDNN_STATUS_EXECUTION_FAILED ; GPU=0", True),
        ("CUDA failure 214: uncorrectable ECC error encountered", True),
        ("CUDA failure 2: out of memory ; GPU=0", False),
        ("Non-zero status code returned while running Gather node. indices element out of data bounds", False),
        ("Exiting due to terminate flag being set to true.", False),
    ],
)
def test_errors_that_only_a_new_process_recovers_from_are_told_from_others(message: str, *, fatal: bool) -> None:
    assert is_fatal(RuntimeError(message), Device.CUDA) is fatal
    assert not is_fatal(RuntimeError(message), Device.CPU)


def test_a_failure_that_a_provider_reports_as_its_own_is_fatal() -> None:
    error = EPFail("[ONNXRuntimeError] : 11 : EP_FAIL : TensorRT EP execution context enqueue failed.")

    assert is_fatal(error, Device.TENSORRT)


def test_a_gpu_that_leaves_costly_operators_to_the_cpu_is_refused_with_their_count(tmp_path: Path) -> None:
    session = Session(saved(graphs.slow(), tmp_path), graphs.cpu_options(tmp_path))
    as_if_on_a_gpu(session, saved(graphs.slow(), tmp_path))

    with pytest.raises(ProviderUnavailableError, match="CUDAExecutionProvider was asked for and would leave 1 MatMul"):
        session._require_on_device(Device.CUDA)  # noqa: SLF001  no GPU is here to leave anything


def test_a_gpu_may_leave_computations_of_shapes_to_the_cpu(tmp_path: Path) -> None:
    session = Session(saved(graphs.affine(), tmp_path), graphs.cpu_options(tmp_path))
    as_if_on_a_gpu(session, saved(graphs.affine(), tmp_path))

    session._require_on_device(Device.CUDA)  # noqa: SLF001  as above


def as_if_on_a_gpu(session: Session, graph: Path) -> None:
    """Let ONNX Runtime say which nodes went to the CPU, as sessions on a GPU do: here all."""
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    session._session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])  # noqa: SLF001
    session.providers = ("CUDAExecutionProvider", "CPUExecutionProvider")
