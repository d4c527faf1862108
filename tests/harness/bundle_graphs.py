"""Small ONNX graphs, written by hand."""

from pathlib import Path

import onnx
from onnx import TensorProto, helper


def identity_graph() -> onnx.ModelProto:
    """Return a graph whose output y is its input x: float32 [batch, 2]."""
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 2]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "identity", [x], [y])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def write_graph(path: Path) -> None:
    """Write the identity."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(identity_graph().SerializeToString())


def external_tensor(location: str, **entries: int | str) -> TensorProto:
    """Return a float32 [2] tensor `weight` whose data is elsewhere."""
    tensor = TensorProto(name="weight", data_type=TensorProto.FLOAT, dims=[2], data_location=TensorProto.EXTERNAL)
    for key, value in {"location": location, **entries}.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def write_graph_with_external(path: Path, location: str, **entries: int | str) -> None:
    """Write the identity with an initializer whose data is at `location`."""
    model = identity_graph()
    model.graph.initializer.append(external_tensor(location, **entries))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model.SerializeToString())
