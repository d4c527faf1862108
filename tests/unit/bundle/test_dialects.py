"""What folders of many releases of many libraries say is honoured, or refused by file, key and remedy."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness.bundle_graphs import write_graph
from modelfleet.bundle import sentence_transformers
from modelfleet.bundle.directory import open_directory
from modelfleet.bundle.infer import infer_manifest
from modelfleet.runtime.errors import InvalidBundleError
from onnx import TensorProto, helper, save

BERT = {"architectures": ["BertModel"], "model_type": "bert", "max_position_embeddings": 512, "vocab_size": 30522}
HEAD = {**BERT, "architectures": ["BertForSequenceClassification"]}
LOWER_CASE = {"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Lowercase"}]}}
BERT_CASED = {"normalizer": {"type": "BertNormalizer", "lowercase": False, "strip_accents": None}}
NORMALIZE = {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"}


def modules(style: str = "models", *more: Mapping[str, object], path: str = "1_Pooling") -> list[Mapping[str, object]]:
    """Return modules.json as releases wrote it: `models` up to 5.3, `5.4` from there on."""
    transformer, pooling = {
        "models": ("sentence_transformers.models.Transformer", "sentence_transformers.models.Pooling"),
        "5.4": (
            "sentence_transformers.base.modules.transformer.Transformer",
            "sentence_transformers.sentence_transformer.modules.pooling.Pooling",
        ),
    }[style]
    return [
        {"idx": 0, "name": "0", "path": "", "type": transformer},
        {"idx": 1, "name": "1", "path": path, "type": pooling},
        *more,
    ]


def flags(*on: str) -> dict[str, object]:
    every = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")
    return {"word_embedding_dimension": 384} | {f"pooling_mode_{mode}": mode in on for mode in every}


def folder(root: Path, files: Mapping[str, object]) -> Path:
    for path, value in {"config.json": BERT, "tokenizer.json": {}, **files}.items():
        if value is not None:
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_text(value if isinstance(value, str) else json.dumps(value))
    write_graph(root / "model.onnx")
    return root


HONOURED: dict[str, tuple[dict[str, object], dict[str, object]]] = {
    "sentence-transformers 2: mean, normalized": (
        {
            "modules.json": modules("models", NORMALIZE),
            "1_Pooling/config.json": flags("mean_tokens"),
            "sentence_bert_config.json": {"max_seq_length": 256, "do_lower_case": False},
            "config_sentence_transformers.json": {"__version__": {"sentence_transformers": "2.0.0"}},
        },
        {"task": "embed", "pooling": "mean", "normalize": True, "max_tokens": 256},
    ),
    "sentence-transformers 3: cls, a default prompt": (
        {
            "modules.json": modules(),
            "1_Pooling/config.json": {**flags("cls_token"), "include_prompt": True},
            "config_sentence_transformers.json": {
                "prompts": {"query": "query: ", "passage": "passage: "},
                "default_prompt_name": "query",
                "similarity_fn_name": "cosine",
            },
        },
        {"task": "embed", "pooling": "cls", "normalize": False, "prompt": "query: "},
    ),
    **{
        f"sentence-transformers 5.4: {mode}": (
            {
                "modules.json": modules("5.4"),
                "1_Pooling/config.json": {"embedding_dimension": 4, "pooling_mode": said, "include_prompt": True},
                "config_sentence_transformers.json": {"model_type": "SentenceTransformer", "prompts": {}},
            },
            {"task": "embed", "pooling": pooling},
        )
        for mode, said, pooling in (
            ("mean", "mean", "mean"),
            ("cls", "cls", "cls"),
            ("lasttoken", "lasttoken", "last"),
            ("max", "max", "max"),
            ("weightedmean", "weightedmean", "weighted-mean"),
            ("mean_sqrt_len_tokens", "mean_sqrt_len_tokens", "mean-sqrt-length"),
            ("a list of one", ["cls"], "cls"),
        )
    },
    "limits in the first file that says any": (
        {
            "modules.json": modules(),
            "1_Pooling/config.json": flags("mean_tokens"),
            "sentence_bert_config.json": {},
            "sentence_roberta_config.json": {"max_seq_length": 75},
        },
        {"max_tokens": 75},
    ),
    "a graph that pools, and a default prompt": (
        {
            "modelfleet.yaml": {"pooling": "model"},
            "modules.json": modules(),
            "config_sentence_transformers.json": {
                "prompts": {"q": "query: "},
                "default_prompt_name": "q",
                "truncate_dim": 2,
            },
        },
        {"pooling": "model", "prompt": "query: ", "truncate_dimensions": 2},
    ),
    "a cross-encoder of 6 whose scores are logits": (
        {
            "config.json": {**HEAD, "id2label": {"0": "LABEL_0"}},
            "config_sentence_transformers.json": {
                "model_type": "CrossEncoder",
                "activation_fn": "torch.nn.modules.linear.Identity",
            },
        },
        {"task": "rerank", "activation": "none"},
    ),
    "a cross-encoder of three labels": (
        {
            "config.json": {**HEAD, "id2label": {"0": "a", "1": "b", "2": "c"}},
            "config_sentence_transformers.json": {"model_type": "CrossEncoder"},
        },
        {"task": "classify", "activation": "none"},
    ),
    "a pooling folder of another name": (
        {"modules.json": modules(path="pool"), "pool/config.json": flags("cls_token")},
        {"pooling": "cls"},
    ),
    "a pooling that says nothing is the library's default": (
        {"modules.json": modules(), "1_Pooling/config.json": {"word_embedding_dimension": 4}},
        {"pooling": "mean"},
    ),
    "limits under another name": (
        {
            "modules.json": modules(),
            "1_Pooling/config.json": flags("mean_tokens"),
            "sentence_roberta_config.json": {"max_seq_length": 75, "do_lower_case": False},
        },
        {"max_tokens": 75},
    ),
    "do_lower_case that the tokenizer does": (
        {
            "modules.json": modules(),
            "1_Pooling/config.json": flags("mean_tokens"),
            "tokenizer.json": LOWER_CASE,
            "sentence_bert_config.json": {"max_seq_length": 75, "do_lower_case": True},
        },
        {"max_tokens": 75},
    ),
    "matryoshka": (
        {
            "modules.json": modules(),
            "1_Pooling/config.json": flags("mean_tokens"),
            "config_sentence_transformers.json": {"truncate_dim": 2},
        },
        {"truncate_dimensions": 2},
    ),
    "a decoder that embeds": (
        {
            "config.json": {**BERT, "architectures": ["Qwen3ForCausalLM"]},
            "modules.json": modules("models", NORMALIZE),
            "1_Pooling/config.json": flags("lasttoken"),
        },
        {"task": "embed", "pooling": "last", "normalize": True},
    ),
    "a cross-encoder of 5.4": (
        {
            "config.json": {**HEAD, "id2label": {"0": "LABEL_0"}},
            "modules.json": modules("5.4")[:1],
            "config_sentence_transformers.json": {"model_type": "CrossEncoder", "prompts": {}},
        },
        {"task": "rerank", "activation": "softmax"},
    ),
    "a cross-encoder with modules, and nothing else that says so": (
        {"config.json": {**HEAD, "num_labels": 1}, "modules.json": modules("5.4")[:1]},
        {"task": "rerank"},
    ),
    "a cross-encoder of 4 whose scores are logits": (
        {
            "config.json": {
                **HEAD,
                "id2label": {"0": "relevant"},
                "sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity", "version": "4.1.0"},
            }
        },
        {"task": "rerank", "activation": "none"},
    ),
    "transformers: no labels": ({"config.json": HEAD}, {"task": "classify", "labels": ("LABEL_0", "LABEL_1")}),
    "transformers: labels that are null": (
        {"config.json": {**HEAD, "id2label": None, "num_labels": None}},
        {"labels": ("LABEL_0", "LABEL_1")},
    ),
    "transformers: a number of labels": (
        {"config.json": {**HEAD, "num_labels": 3}},
        {"labels": ("LABEL_0", "LABEL_1", "LABEL_2"), "activation": "softmax"},
    ),
    "transformers: one label with a name": (
        {"config.json": {**HEAD, "id2label": {"0": "toxic"}}},
        {"task": "classify", "activation": "sigmoid"},
    ),
    "transformers: a regression": (
        {"config.json": {**HEAD, "id2label": {"0": "a", "1": "b"}, "problem_type": "regression"}},
        {"task": "classify", "activation": "none"},
    ),
    "transformers 5: positions behind the padding": (
        {"config.json": {**BERT, "model_type": "data2vec-text", "max_position_embeddings": 514, "pad_token_id": 1}},
        {"max_tokens": 512},
    ),
    "transformers: no limit is 1e30": (
        {"tokenizer_config.json": '{"model_max_length": 1e30}'},
        {"max_tokens": 512},
    ),
    "optimum: a head, in a folder of its own": ({"ort_config.json": {"opset": 18}}, {"task": "embed"}),
    "timm: an encoder of images": (
        {"config.json": {"architecture": "resnet18", "num_classes": 1000}, "tokenizer.json": None},
        {"task": "tensor"},
    ),
}


@pytest.mark.parametrize("name", HONOURED)
def test_what_a_folder_says_is_served(tmp_path: Path, name: str) -> None:
    files, expected = HONOURED[name]

    given: Any = files.get("modelfleet.yaml", {})
    manifest = infer_manifest(folder(tmp_path, files), given).model_dump()

    assert {field: manifest[field] for field in expected} == expected


_PLAIN = {"modules.json": modules(), "1_Pooling/config.json": flags("mean_tokens")}
REFUSED: dict[str, tuple[dict[str, object], str]] = {
    "several poolings": (
        {**_PLAIN, "1_Pooling/config.json": {"pooling_mode": ["cls", "mean"]}},
        "pooling cls and mean",
    ),
    "modules out of order": ({**_PLAIN, "modules.json": modules()[::-1]}, "not in the order of their idx"),
    "no modules": ({**_PLAIN, "modules.json": []}, "names no modules"),
    "poolings that disagree": (
        {**_PLAIN, "1_Pooling/config.json": {"pooling_mode": "mean", "pooling_mode_cls_token": True}},
        "is empty, or differs from the flags",
    ),
    "no pooling in a list": ({**_PLAIN, "1_Pooling/config.json": {"pooling_mode": []}}, "is empty, or differs"),
    "norms of tokens": (
        {
            **_PLAIN,
            "modules.json": modules("models", NORMALIZE),
            "2_Normalize/config.json": {"module_input_name": "token_embeddings"},
        },
        'module_input_name is "token_embeddings", which cannot be served',
    ),
    "another output that is pooled": (
        {**_PLAIN, "sentence_bert_config.json": {"module_output_name": "pooler_output"}},
        'module_output_name is "pooler_output", which is not pooled here',
    ),
    "images": (
        {**_PLAIN, "sentence_bert_config.json": {"modality_config": {"image": {}}}},
        "which is not a text's last hidden state",
    ),
    "no length": ({**_PLAIN, "sentence_bert_config.json": {"max_seq_length": 0}}, "max_seq_length is 0, which is less"),
    "no dimensions": (
        {**_PLAIN, "config_sentence_transformers.json": {"truncate_dim": 0}},
        "truncate_dim is 0, which is less than 1",
    ),
    "a padding that is a string": ({"config.json": {**BERT, "pad_token_id": "0"}}, 'pad_token_id is "0", which is not'),
    "labels of tokens beside modules": (
        {**_PLAIN, "config.json": {**BERT, "architectures": ["BertForTokenClassification"]}},
        "labels tokens, beside modules that embed",
    ),
    "a cross-encoder with a projection": (
        {
            "config.json": {**HEAD, "num_labels": 1},
            "modules.json": [
                modules()[0],
                {"idx": 1, "path": "1_Dense", "type": "sentence_transformers.models.Dense"},
            ],
            "config_sentence_transformers.json": {"model_type": "CrossEncoder"},
        },
        "the modules of a model that scores are Transformer, Dense",
    ),
    "a cross-encoder's activation": (
        {
            "config.json": {**HEAD, "num_labels": 1},
            "config_sentence_transformers.json": {
                "model_type": "CrossEncoder",
                "activation_fn": "torch.nn.modules.activation.Tanh",
            },
        },
        "asks for an activation that cannot be served",
    ),
    "several flags": ({**_PLAIN, "1_Pooling/config.json": flags("cls_token", "mean_tokens")}, "pooling cls and mean"),
    "no flag": ({**_PLAIN, "1_Pooling/config.json": flags()}, "every pooling_mode is off"),
    "an unknown pooling": ({**_PLAIN, "1_Pooling/config.json": {"pooling_mode": "attention"}}, "pooling attention"),
    "an unknown flag": (
        {**_PLAIN, "1_Pooling/config.json": {**flags("mean_tokens"), "pooling_mode_attention": True}},
        r"1_Pooling/config\.json: pooling_mode_attention is true, which is not known",
    ),
    "a flag that is a string": (
        {**_PLAIN, "1_Pooling/config.json": {"pooling_mode_cls_token": "true"}},
        r'pooling_mode_cls_token is "true", which is not true or false',
    ),
    "a pooling that is a number": (
        {**_PLAIN, "1_Pooling/config.json": {"pooling_mode": 1}},
        "pooling_mode is 1, which",
    ),
    "a pooling that is not there": (
        {"modules.json": modules()},
        r"names '1_Pooling' for the pooling, and .* not there",
    ),
    "no pooling": ({"modules.json": modules()[:1]}, "the modules are Transformer; "),
    "a projection": (
        {
            **_PLAIN,
            "modules.json": modules(
                "models", {"idx": 2, "path": "2_Dense", "type": "sentence_transformers.models.Dense"}
            ),
        },
        "Transformer, Pooling, Dense",
    ),
    "normalized before it is pooled": (
        {**_PLAIN, "modules.json": [modules()[0], {**NORMALIZE, "idx": 1}, {**modules()[1], "idx": 2}]},
        "Transformer, Normalize, Pooling",
    ),
    "code of one's own": (
        {**_PLAIN, "modules.json": [{"idx": 0, "path": "", "type": "custom_st.Transformer"}, modules()[1]]},
        "'custom_st.Transformer' is code of its own",
    ),
    "a model in a folder": (
        {**_PLAIN, "modules.json": [{**modules()[0], "path": "0_Transformer"}, modules()[1]]},
        "keeps the model in '0_Transformer'",
    ),
    "do_lower_case that the tokenizer does not": (
        {**_PLAIN, "sentence_bert_config.json": {"max_seq_length": 9, "do_lower_case": True}},
        "do_lower_case is true, which tokenizer.json does not do. Add the normalizer Lowercase",
    ),
    "a limit that is a string": (
        {**_PLAIN, "sentence_bert_config.json": {"max_seq_length": "512"}},
        r'sentence_bert_config\.json: max_seq_length is "512", which is not an integer',
    ),
    "a limit that is true": (
        {**_PLAIN, "sentence_bert_config.json": {"max_seq_length": True}},
        "max_seq_length is true, which is not an integer",
    ),
    "an unknown limit": (
        {**_PLAIN, "sentence_bert_config.json": {"max_sequence_length": 9}},
        "max_sequence_length is 9, which is not known to this release",
    ),
    "a default prompt that is not there": (
        {**_PLAIN, "config_sentence_transformers.json": {"prompts": {}, "default_prompt_name": "query"}},
        'default_prompt_name is "query", which is not among its prompts',
    ),
    "a prompt that is not pooled": (
        {
            **_PLAIN,
            "1_Pooling/config.json": {"pooling_mode": "mean", "include_prompt": False},
            "config_sentence_transformers.json": {"prompts": {"q": "query: "}, "default_prompt_name": "q"},
        },
        "include_prompt: false",
    ),
    "a sparse encoder": (
        {**_PLAIN, "config_sentence_transformers.json": {"model_type": "SparseEncoder"}},
        'model_type is "SparseEncoder", which cannot be served',
    ),
    "an unknown kind of key": (
        {**_PLAIN, "config_sentence_transformers.json": {"late_interaction": True}},
        "late_interaction is true, which is not known",
    ),
    "an unknown problem": (
        {"config.json": {**HEAD, "problem_type": "ordinal"}},
        'problem_type is "ordinal", which is not one of',
    ),
    "labels that disagree": (
        {"config.json": {**HEAD, "id2label": {"0": "a", "1": "b"}, "num_labels": 3}},
        "num_labels is 3, which differs from the 2 labels of id2label",
    ),
    "a label that is null": (
        {"config.json": {**HEAD, "id2label": {"0": None, "1": "b"}}},
        "id2label is .* not strings",
    ),
    "an activation of cross-encoders": (
        {
            "config.json": {
                **HEAD,
                "id2label": {"0": "LABEL_0"},
                "sentence_transformers": {"activation_fn": "torch.nn.modules.activation.Tanh"},
            }
        },
        "asks for an activation that cannot be served",
    ),
    "heads of two tasks": (
        {"config.json": {**BERT, "architectures": ["BertModel", "BertForTokenClassification"]}},
        "names models of different tasks",
    ),
    "CLIP": (
        {"config.json": {**BERT, "architectures": ["CLIPModel"], "text_config": {"hidden_size": 4}}},
        r"CLIPModel is a model of several kinds of input \(text_config\)",
    ),
    "an encoder with a decoder": (
        {"config.json": {**BERT, "architectures": ["MarianMTModel"], "is_encoder_decoder": True}},
        "MarianMTModel is a model with a decoder",
    ),
    "a cased tokenizer under a config that is not": (
        {"tokenizer.json": BERT_CASED, "tokenizer_config.json": {"do_lower_case": True}},
        r"tokenizer_config\.json: do_lower_case is true, which differs from tokenizer\.json, where lowercase is False",
    ),
    "truncation from the left": (
        {"tokenizer_config.json": {"truncation_side": "left"}},
        'truncation_side is "left", which is not the default here',
    ),
    "a key twice": ({"config.json": '{"vocab_size": 5, "vocab_size": 6}'}, "gives the key 'vocab_size' twice"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_served_is_refused_by_file_and_key(tmp_path: Path, name: str) -> None:
    files, message = REFUSED[name]

    with pytest.raises(InvalidBundleError, match=message):
        infer_manifest(folder(tmp_path, files))


def save_graph(root: Path, output: tuple[int, list[object]]) -> None:
    graph = helper.make_graph(
        [helper.make_node("Identity", ["input_ids"], ["y"])],
        "graph",
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["n", "tokens"])],
        [helper.make_tensor_value_info("y", *output)],
    )
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), root / "model.onnx")


@pytest.mark.parametrize(
    ("manifest", "output", "message"),
    [
        ({"task": "embed"}, (TensorProto.INT64, ["n", "tokens", 4]), "has the dtype int64, and vectors are floats"),
        ({"task": "embed"}, (TensorProto.FLOAT, ["n", "tokens", 30522]), "as wide as the vocabulary"),
        ({"task": "embed"}, (TensorProto.FLOAT, ["n", "tokens", 30592]), "as wide as the vocabulary"),
        ({"task": "embed"}, (TensorProto.FLOAT, ["n"]), "has 1 dimensions"),
        ({"task": "rerank"}, (TensorProto.FLOAT, ["n", 3]), "has 3 scores a text"),
        ({"task": "classify", "labels": ["a", "b"]}, (TensorProto.FLOAT, ["n", 3]), "scores 3 labels, .* has 2"),
        (
            {"task": "classify", "labels": ["a"], "activation": "softmax"},
            (TensorProto.FLOAT, ["n", 1]),
            "whose softmax is 1 for every text",
        ),
        ({"task": "entities", "labels": ["O", "B-X"]}, (TensorProto.FLOAT, ["n", 2]), "has 2 dimensions"),
        ({"task": "embed", "output": "z"}, (TensorProto.FLOAT, ["n", 4]), "output is 'z'; the graph has y"),
        ({"task": "embed", "truncate_dimensions": 9}, (TensorProto.FLOAT, ["n", 4]), "truncate_dimensions is 9"),
    ],
)
def test_a_graph_whose_output_is_none_of_its_task_s_is_refused_before_it_is_sent(
    tmp_path: Path, manifest: dict[str, Any], output: tuple[int, list[object]], message: str
) -> None:
    root = folder(tmp_path, {"modelfleet.yaml": manifest})
    save_graph(root, output)

    with pytest.raises(InvalidBundleError, match=message):
        open_directory(root)


def test_vectors_may_be_wider_than_a_small_vocabulary(tmp_path: Path) -> None:
    # As of facebook/esm2_t6_8M_UR50D, which reads proteins.
    root = folder(tmp_path, {"config.json": {**BERT, "vocab_size": 33}, "modelfleet.yaml": {"task": "embed"}})
    save_graph(root, (TensorProto.FLOAT, ["n", "tokens", 320]))

    bundle, _ = open_directory(root)

    assert bundle.manifest.vocabulary_size == 33


def test_the_page_on_folders_names_every_key_that_is_read() -> None:
    page = (Path(__file__).parents[3] / "docs/model-folders.md").read_text()
    named = set(re.findall(r"`([^`]+)`", page))
    known = {
        *sentence_transformers.LIMITS_FILES,
        *sentence_transformers.LIMITS_KEYS,
        *sentence_transformers.POOLING_KEYS,
        *sentence_transformers.MODULE_KEYS,
        *sentence_transformers.LIBRARY_KEYS,
    }

    assert known <= named, known - named
    assert np.all([file in page for file in (sentence_transformers.MODULES_FILE, sentence_transformers.LIBRARY_FILE)])
