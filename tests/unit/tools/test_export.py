"""Exports of tiny models with random weights, by the real exporters."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from harness.hub import SHA, serving_hub
from harness.small_tokenizers import wordpiece_json
from modelfleet.bundle.directory import open_directory
from modelfleet.bundle.golden import read_golden
from modelfleet.bundle.graph import precision
from modelfleet.bundle.manifest import Task
from modelfleet.runtime.errors import InvalidBundleError, InvalidInputError, StateConflictError
from modelfleet_tools.__main__ import app
from onnx import TensorProto, helper
from typer.testing import CliRunner

pytest.importorskip("torch", reason="torch is not installed: `make test-export` installs it and runs these tests")

import torch
import transformers
from modelfleet_tools.export import exporting, modules
from modelfleet_tools.export.compression import Compression
from modelfleet_tools.export.exporting import export, verify
from modelfleet_tools.export.graph import Graph
from modelfleet_tools.export.origin import Origin
from modelfleet_tools.export.quiet import quiet
from modelfleet_tools.export.source import Axis, Source
from modelfleet_tools.export.widths import Width
from modelfleet_tools.labelled_texts import LabelledTexts

pytestmark = [pytest.mark.slow, pytest.mark.export, pytest.mark.filterwarnings("ignore")]

LABELS = {0: "no", 1: "yes", 2: "perhaps"}
SMALL = {
    "vocab_size": 100,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 26,
    "pad_token_id": 0,
}
DISTILBERT = {
    "vocab_size": 100,
    "dim": 16,
    "n_layers": 1,
    "n_heads": 2,
    "hidden_dim": 32,
    "max_position_embeddings": 26,
    "pad_token_id": 0,
}
FAMILIES: dict[str, tuple[str, dict[str, Any], Task]] = {
    "bert": ("BertModel", SMALL, Task.EMBED),
    "roberta": ("RobertaForSequenceClassification", SMALL, Task.CLASSIFY),
    "distilbert": ("DistilBertForTokenClassification", DISTILBERT, Task.ENTITIES),
    "xlm-roberta": ("XLMRobertaForSequenceClassification", SMALL, Task.RERANK),
    "deberta": ("DebertaForSequenceClassification", SMALL, Task.CLASSIFY),
}


def checkpoint(folder: Path, family: str) -> Path:
    """Save a model of random weights as transformers would."""
    with quiet():
        name, values, task = FAMILIES[family]
        labels = {0: "relevance"} if task is Task.RERANK else LABELS
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(family, **values, id2label=labels, initializer_range=0.5)
        getattr(transformers, name)(config).save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes(wordpiece_json())
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Tiny\n")
    (folder / "LICENSE").write_text("as is")
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_an_encoder_becomes_a_bundle_that_is_its_source_at_every_shape(family: str, tmp_path: Path) -> None:
    report = export(Origin(folder=str(checkpoint(tmp_path / "source", family))), tmp_path / "bundle")

    bundle, paths = open_directory(tmp_path / "bundle")
    assert bundle.manifest.task is FAMILIES[family][2]
    assert bundle.manifest.license == "mit"
    assert {"LICENSE", "README.md", "config.json", "tokenizer.json", "golden.npz"} <= paths.keys()
    labelled = bundle.manifest.task in (Task.CLASSIFY, Task.ENTITIES)
    assert bundle.manifest.labels == (tuple(LABELS.values()) if labelled else ())
    assert report.exported.exporter == "dynamo"
    assert report.exported.opset >= 18
    assert report.parity.worst < 1e-3
    assert json.loads((tmp_path / "bundle/export.json").read_text())["versions"]["torch"]
    assert len(read_golden(tmp_path / "bundle/golden.npz")) == 4


def test_a_bundle_is_verified_at_every_length_and_a_changed_one_is_not(tmp_path: Path) -> None:
    export(Origin(folder=str(checkpoint(tmp_path / "source", "bert"))), tmp_path / "bundle")

    parity, drift = verify(tmp_path / "bundle")

    assert parity.shapes >= 26
    assert drift < 1e-3
    torch_model = checkpoint(tmp_path / "other", "bert")
    weights = torch_model / "config.json"
    weights.write_text(weights.read_text().replace('"layer_norm_eps": 1e-12', '"layer_norm_eps": 0.5'))
    with pytest.raises(InvalidBundleError, match="differs from its source by"):
        verify(tmp_path / "bundle", Origin(folder=str(torch_model)))


@pytest.mark.parametrize("width", [Width.FP16, Width.INT8])
def test_narrow_numbers_are_reported_with_size_speed_drift_and_quality(width: Width, tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "source", "roberta")
    data = LabelledTexts(["the cat sat", "hello world", "on the mat"] * 4, ["no", "yes", "perhaps"] * 4)

    report = export(
        Origin(folder=str(source)), tmp_path / "bundle", Compression(precision=width, max_drift=0.5), data=data
    )

    assert [step.name for step in report.steps] == ["source", "fp32", width.value]
    assert precision(tmp_path / "bundle/model.onnx") == width.value
    assert all(step.per_s > 0 for step in report.steps)
    assert 0 < report.steps[2].drift <= 0.5
    assert report.steps[0].accuracy == report.steps[1].accuracy
    assert report.steps[2].f1 is not None
    # The record says what was allowed, also when the source is named.
    assert verify(tmp_path / "bundle", Origin(folder=str(source)))[1] == pytest.approx(report.steps[2].drift, abs=1e-3)


def test_neurons_are_left_out_and_a_drift_past_the_limit_leaves_nothing(tmp_path: Path) -> None:
    origin = Origin(folder=str(checkpoint(tmp_path / "source", "bert")))

    report = export(origin, tmp_path / "pruned", Compression(prune=0.5))

    assert report.pruned == "50% of the neurons of 1 feed-forward layers, 16 are left in each"
    assert report.steps[2].size < report.steps[1].size
    verify(tmp_path / "pruned")
    with pytest.raises(InvalidBundleError, match=r"drift by .*; 1e-06 is allowed\. Choose a wider"):
        export(origin, tmp_path / "bundle", Compression(prune=0.5, max_drift=1e-6))
    assert not (tmp_path / "bundle").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pruned", "source"]


def test_weights_of_a_repository_without_a_graph_are_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = checkpoint(tmp_path / "source", "bert")
    files = {path.name: path.read_bytes() for path in source.iterdir()}
    with serving_hub({"org/tiny": files}) as (url, _):
        monkeypatch.setenv("HF_ENDPOINT", url)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        arguments = ["import", "hf://org/tiny", "--out", str(tmp_path / "bundle"), "--json"]
        done = CliRunner().invoke(app, arguments)

    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["revision"] == SHA
    bundle, paths = open_directory(tmp_path / "bundle")
    assert (bundle.manifest.task, bundle.manifest.license) == ("embed", "mit")
    assert {"LICENSE", "README.md", "golden.npz"} <= paths.keys()


def test_bad_sources_are_refused_with_what_can_be_exported(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "source", "bert")
    other = tmp_path / "other"
    other.mkdir()

    with pytest.raises(InvalidBundleError, match=r"holds no model: it has no config\.json"):
        export(Origin(folder=str(other)), tmp_path / "bundle")
    (other / "config.json").write_text('{"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}')
    with pytest.raises(InvalidBundleError, match=r"'t5' \(T5ForConditionalGeneration\).* Can be: albert, bert, "):
        export(Origin(folder=str(other), task="embed"), tmp_path / "bundle")
    with pytest.raises(InvalidBundleError, match="was not trained for classify: its weights lack classifier"):
        export(Origin(folder=str(source), task="classify"), tmp_path / "bundle")
    (other / "config.json").write_bytes((source / "config.json").read_bytes())
    with pytest.raises(InvalidBundleError, match=r"no tokenizer\.json|cannot load"):
        export(Origin(folder=str(other)), tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_labels_that_differ_are_refused(tmp_path: Path) -> None:
    source = str(checkpoint(tmp_path / "source", "roberta"))

    with pytest.raises(InvalidInputError, match="has 3 outputs, and 2 labels are given: a, b"):
        export(Origin(folder=source, labels=("a", "b")), tmp_path / "bundle")
    with pytest.raises(InvalidInputError, match="The data has the labels maybe, the model no, yes, perhaps"):
        export(Origin(folder=source), tmp_path / "bundle", data=LabelledTexts(["a", "b"], ["maybe", "no"]))


def test_what_exists_is_replaced_only_when_asked_to(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "source", "bert")
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle/mine").touch()

    with pytest.raises(StateConflictError, match=r"exists\. Give another --out, or --overwrite"):
        export(Origin(folder=str(source)), tmp_path / "bundle")
    assert (tmp_path / "bundle/mine").exists()
    export(Origin(folder=str(source)), tmp_path / "bundle", overwrite=True)
    assert not (tmp_path / "bundle/mine").exists()


class NoMask(torch.nn.Module):
    """Takes padding for text."""

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        values = input_ids.to(torch.float32).mean(dim=1, keepdim=True) + 0 * attention_mask.sum(dim=1, keepdim=True)
        return torch.cat([values, -values], dim=1)


class Loose(torch.nn.Module):
    """Has an operator that no exporter knows."""

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return torch.linalg.eigvals(values[:, :2, None] * values[:, None, :2]).real


def pair() -> tuple[torch.nn.Module, dict[str, np.ndarray]]:
    torch.manual_seed(0)
    return torch.nn.Linear(3, 2), {"values": np.ones((2, 3), np.float32)}


def no_mask() -> Source:
    ids = np.array([[5, 6, 7], [8, 0, 0]])
    axes = {0: Axis("batch", 1, 8), 1: Axis("sequence", 1, 8)}
    manifest = {"task": "classify", "labels": ["a", "b"], "tokenizer": "tokenizer.json", "max_tokens": 8}
    inputs = {"input_ids": ids, "attention_mask": (ids > 0).astype(np.int64)}
    return Source(
        NoMask(), inputs, ("logits",), dict.fromkeys(inputs, axes), manifest, {"tokenizer.json": wordpiece_json()}
    )


def loose() -> tuple[torch.nn.Module, dict[str, np.ndarray]]:
    return Loose(), {"values": np.ones((2, 3), np.float32)}


def nothing() -> int:
    return 3


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    return Path(__file__).stem


def test_a_module_and_its_example_inputs_become_a_tensor_model(here: str, tmp_path: Path) -> None:
    report = export(Origin(module=f"{here}:pair", license="MIT"), tmp_path / "bundle")

    assert yaml.safe_load((tmp_path / "bundle/modelfleet.yaml").read_text()) == {
        "task": "tensor",
        "model": "model.onnx",
        "license": "MIT",
    }
    assert report.parity.worst < 1e-5
    outputs = Graph(tmp_path / "bundle/model.onnx").run({"values": np.ones((5, 3), np.float32)})
    assert outputs["output"].shape == (5, 2)
    verify(tmp_path / "bundle")


def test_an_answer_that_depends_on_padding_is_refused(here: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidBundleError, match="when it is padded beside longer ones"):
        export(Origin(module=f"{here}:no_mask"), tmp_path / "bundle")


def test_an_operator_that_cannot_be_exported_is_named(here: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidBundleError, match=r"cannot be exported.*eig"):
        export(Origin(module=f"{here}:loose"), tmp_path / "bundle")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nonsense", "names no factory"),
        ("no_such_module:x", "cannot be imported"),
        ("{here}:absent", "has no absent"),
        ("{here}:nothing", "returned a int"),
    ],
)
def test_a_factory_that_is_none_is_refused(here: str, name: str, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        modules.open_module(name.format(here=here))


def test_an_operator_that_onnx_runtime_lacks_is_named(tmp_path: Path) -> None:
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 2]) for name in "xy")
    node = helper.make_node("Frobnicate", ["x"], ["y"], domain="com.example")
    graph = helper.make_graph([node], "g", [x], [y])
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.example", 1)]
    path = tmp_path / "model.onnx"
    path.write_bytes(helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString())

    with pytest.raises(InvalidBundleError, match=r"lacks the operator com\.example:Frobnicate"):
        Graph(path)


def test_what_was_not_exported_here_needs_its_source_named(tmp_path: Path) -> None:
    (tmp_path / "bundle").mkdir()

    with pytest.raises(InvalidBundleError, match="Name its source: --source DIR, or --module"):
        exporting.verify(tmp_path / "bundle")
