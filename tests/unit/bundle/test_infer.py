import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from harness.bundle_graphs import write_graph
from modelfleet.bundle.infer import infer_manifest
from modelfleet.bundle.manifest import Activation, Manifest, Pooling, Task
from modelfleet.runtime.errors import InvalidBundleError

ENCODER = {"architectures": ["BertModel"], "model_type": "bert", "max_position_embeddings": 512, "vocab_size": 30522}
TRANSFORMER = "sentence_transformers.models.Transformer"
POOLING = "sentence_transformers.models.Pooling"
NORMALIZE = "sentence_transformers.models.Normalize"


def folder(root: Path, files: Mapping[str, object], *graphs: str) -> Path:
    """Write JSON files, and graphs (model.onnx when none is named)."""
    for path, value in {"tokenizer.json": {}, **files}.items():
        if value is not None:
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_text(json.dumps(value))
    for path in graphs or ("model.onnx",):
        write_graph(root / path)
    return root


def inferred(root: Path, config: Mapping[str, Any], **files: object) -> Manifest:
    named = {path.replace("__", "/") + ".json": value for path, value in files.items()}
    return infer_manifest(folder(root, {"config.json": {**ENCODER, **config}, **named}))


@pytest.mark.parametrize(
    ("config", "task"),
    [
        ({"architectures": ["BertForTokenClassification"], "id2label": {"0": "O", "1": "B-X"}}, Task.ENTITIES),
        ({"architectures": ["RobertaForSequenceClassification"], "id2label": {"0": "a", "1": "b"}}, Task.CLASSIFY),
        ({"architectures": ["BertForSequenceClassification"], "id2label": {"0": "LABEL_0"}}, Task.RERANK),
        ({"architectures": ["BertForSequenceClassification"], "num_labels": 1}, Task.RERANK),
        ({"architectures": ["BertModel"]}, Task.EMBED),
        ({"architectures": ["ModernBertModel"]}, Task.EMBED),
        ({"architectures": ["LlamaForCausalLM"]}, Task.GENERATE),
        ({"architectures": ["GPT2LMHeadModel"]}, Task.GENERATE),
        ({"architectures": ["ViTForImageClassification"]}, Task.TENSOR),
        ({"architectures": None}, Task.TENSOR),
    ],
)
def test_the_task_is_read_from_the_architecture(tmp_path: Path, config: Mapping[str, Any], task: Task) -> None:
    assert inferred(tmp_path, config).task is task


def test_without_a_config_the_graph_takes_tensors(tmp_path: Path) -> None:
    manifest = infer_manifest(folder(tmp_path, {"tokenizer.json": None}))

    assert manifest == Manifest(task=Task.TENSOR, model="model.onnx")


def test_an_encoder_of_images_takes_tensors(tmp_path: Path) -> None:
    root = folder(tmp_path, {"config.json": {"architectures": ["ViTModel"]}, "tokenizer.json": None})

    assert infer_manifest(root).task is Task.TENSOR


def test_labels_are_in_the_order_of_their_ids_and_not_of_the_file(tmp_path: Path) -> None:
    labels = {"10": "k", "2": "c", "0": "a", "1": "b", **{str(i): f"l{i}" for i in range(3, 10)}}
    config = {"architectures": ["BertForSequenceClassification"], "id2label": labels}

    assert inferred(tmp_path, config).labels[:3] == ("a", "b", "c")
    assert inferred(tmp_path, config).labels[10] == "k"


@pytest.mark.parametrize("labels", [{"0": "a", "2": "c"}, {"a": "0", "b": "1"}])
def test_labels_that_cannot_be_ordered_are_refused(tmp_path: Path, labels: Mapping[str, str]) -> None:
    with pytest.raises(InvalidBundleError, match="id2label"):
        inferred(tmp_path, {"architectures": ["BertForTokenClassification"], "id2label": labels})


@pytest.mark.parametrize(
    ("problem_type", "activation"),
    [
        ("multi_label_classification", Activation.SIGMOID),
        ("single_label_classification", Activation.SOFTMAX),
        (None, Activation.SOFTMAX),
    ],
)
def test_several_labels_at_once_ask_for_a_sigmoid(tmp_path: Path, problem_type: str, activation: Activation) -> None:
    config = {
        "architectures": ["BertForSequenceClassification"],
        "id2label": {"0": "a", "1": "b"},
        "problem_type": problem_type,
    }

    assert inferred(tmp_path, config).activation is activation


@pytest.mark.parametrize(
    ("mode", "pooling"),
    [
        ("mean_tokens", Pooling.MEAN),
        ("cls_token", Pooling.CLS),
        ("lasttoken", Pooling.LAST),
        ("max_tokens", Pooling.MAX),
        ("weightedmean_tokens", Pooling.WEIGHTED_MEAN),
        ("mean_sqrt_len_tokens", Pooling.MEAN_SQRT_LENGTH),
    ],
)
def test_sentence_transformers_say_how_they_pool(tmp_path: Path, mode: str, pooling: Pooling) -> None:
    modules = [
        {"type": TRANSFORMER, "path": ""},
        {"type": POOLING, "path": "1_Pooling"},
        {"type": NORMALIZE, "path": "2_Normalize"},
    ]
    modes = {"pooling_mode_cls_token": False, "word_embedding_dimension": 384, f"pooling_mode_{mode}": True}

    manifest = inferred(tmp_path, {}, modules=modules, **{"1_Pooling__config": modes})

    assert (manifest.task, manifest.pooling, manifest.normalize) == (Task.EMBED, pooling, True)


def test_sentence_transformers_without_that_module_do_not_normalize(tmp_path: Path) -> None:
    modules = [{"type": TRANSFORMER, "path": ""}, {"type": POOLING, "path": "1_Pooling"}]

    assert not inferred(tmp_path, {}, modules=modules, **{"1_Pooling__config": {}}).normalize


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"1_Pooling__config": {"pooling_mode": "median"}}, "asks for the pooling median"),
        (
            {"1_Pooling__config": {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}},
            "asks for the pooling cls and mean",
        ),
        ({"modules": [{"type": "sentence_transformers.models.Dense", "path": "2_Dense"}]}, "the modules are Dense"),
    ],
)
def test_pooling_that_cannot_be_served_is_refused_unless_the_graph_does_it(
    tmp_path: Path, files: Mapping[str, Any], message: str
) -> None:
    files = {"modules": [{"type": TRANSFORMER, "path": ""}, {"type": POOLING, "path": "1_Pooling"}], **files}

    with pytest.raises(InvalidBundleError, match=message):
        inferred(tmp_path, {}, **files)

    assert infer_manifest(tmp_path, {"pooling": "model"}).pooling is Pooling.MODEL


@pytest.mark.parametrize(
    ("config", "files", "max_tokens"),
    [
        ({}, {}, 512),
        ({}, {"sentence_bert_config": {"max_seq_length": 256}}, 256),
        ({}, {"tokenizer_config": {"model_max_length": 128}}, 128),
        ({}, {"tokenizer_config": {"model_max_length": 1000000000000000019884624838656}}, 512),
        ({}, {"sentence_bert_config": {"max_seq_length": None}}, 512),
        ({"model_type": "roberta", "max_position_embeddings": 514, "pad_token_id": 1}, {}, 512),
        ({"model_type": "xlm-roberta", "max_position_embeddings": 8194, "pad_token_id": 1}, {}, 8192),
    ],
)
def test_max_tokens_is_the_least_of_the_limits(
    tmp_path: Path, config: Mapping[str, Any], files: Mapping[str, Any], max_tokens: int
) -> None:
    assert inferred(tmp_path, config, **files).max_tokens == max_tokens


def test_a_limit_that_no_file_tells_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(InvalidBundleError, match="needs max_tokens"):
        inferred(tmp_path, {"max_position_embeddings": None})


@pytest.mark.parametrize(("told", "pad"), [(1, 1), (0, 0), (None, 0), (-1, 0)])
def test_the_padding_and_the_vocabulary_are_the_config_s(tmp_path: Path, told: int | None, pad: int) -> None:
    manifest = inferred(tmp_path, {"pad_token_id": told})

    assert (manifest.pad_token_id, manifest.vocabulary_size, manifest.tokenizer) == (pad, 30522, "tokenizer.json")


def test_a_text_model_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    root = folder(
        tmp_path,
        {
            "config.json": {**ENCODER, "architectures": ["XForTokenClassification"], "id2label": {"0": "O"}},
            "tokenizer.json": None,
        },
    )

    with pytest.raises(InvalidBundleError, match=r"needs a tokenizer: add tokenizer\.json"):
        infer_manifest(root)


def test_genai_models_generate(tmp_path: Path) -> None:
    genai = {"model": {"context_length": 8192, "pad_token_id": 2, "decoder": {"filename": "decoder.onnx"}}}
    root = folder(tmp_path, {"genai_config.json": genai}, "decoder.onnx", "other.onnx")

    manifest = infer_manifest(root)

    assert (manifest.task, manifest.model, manifest.max_tokens, manifest.pad_token_id) == (
        Task.GENERATE,
        "decoder.onnx",
        8192,
        2,
    )


def test_the_chat_template_and_what_it_calls_by_name_are_found(tmp_path: Path) -> None:
    genai = {"model": {"context_length": 8, "decoder": {"filename": "model.onnx"}}}
    config = {"chat_template": "x", "bos_token": "<s>", "eos_token": {"content": "</s>"}, "model_max_length": 9}
    files = {"genai_config.json": genai, "tokenizer_config.json": config}

    inside = infer_manifest(folder(tmp_path / "a", files, "model.onnx"))
    beside = infer_manifest(folder(tmp_path / "b", files, "model.onnx", "chat_template.jinja"))

    assert (inside.chat_template, beside.chat_template) == ("tokenizer_config.json", "chat_template.jinja")
    assert inside.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}


@pytest.mark.parametrize(
    ("graphs", "chosen"),
    [
        (("model.onnx", "onnx/model.onnx"), "model.onnx"),
        (("onnx/model.onnx", "onnx/model_q4.onnx"), "onnx/model.onnx"),
        (("onnx/model_q4.onnx",), "onnx/model_q4.onnx"),
    ],
)
def test_the_graph_is_the_usual_one_or_the_only_one(tmp_path: Path, graphs: tuple[str, ...], chosen: str) -> None:
    assert infer_manifest(folder(tmp_path, {}, *graphs)).model == chosen


def test_several_graphs_are_named_with_the_way_to_choose(tmp_path: Path) -> None:
    root = folder(tmp_path, {}, "onnx/model_q4.onnx", "onnx/model_int8.onnx")

    with pytest.raises(
        InvalidBundleError, match=r"onnx/model_int8\.onnx, onnx/model_q4\.onnx.*`model: .*modelfleet\.yaml"
    ):
        infer_manifest(root)

    assert infer_manifest(root, {"model": "onnx/model_q4.onnx"}).model == "onnx/model_q4.onnx"


def test_a_folder_that_is_no_model_says_what_was_looked_for(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("nothing here")

    with pytest.raises(InvalidBundleError, match=r"looked for model\.onnx, onnx/model\.onnx.*genai_config\.json"):
        infer_manifest(tmp_path)


@pytest.mark.parametrize(("name", "content"), [("config.json", b"{"), ("config.json", b"[]"), ("modules.json", b"{}")])
def test_a_file_that_does_not_parse_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    folder(tmp_path, {"config.json": ENCODER})
    (tmp_path / name).write_bytes(content)

    with pytest.raises(InvalidBundleError, match=name):
        infer_manifest(tmp_path)
