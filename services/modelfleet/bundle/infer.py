"""The manifest of a folder in Hugging Face layout, read from the files that lie in it."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias

from modelfleet.bundle.manifest import MANIFEST_FILE, Activation, Manifest, Pooling, Task
from modelfleet.runtime.errors import InvalidBundleError

Config: TypeAlias = Mapping[str, Any]

GENAI_FILE = "genai_config.json"
TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
CHAT_TEMPLATE_FILE = "chat_template.jinja"

# By the end of a class name of the transformers library, the first that fits.
_TASKS = MappingProxyType(
    {
        "ForTokenClassification": Task.ENTITIES,
        "ForSequenceClassification": Task.CLASSIFY,
        "ForCausalLM": Task.GENERATE,
        "LMHeadModel": Task.GENERATE,
        "ForMaskedLM": Task.EMBED,
        "Model": Task.EMBED,
    }
)
_NAMED = 8
_GRAPHS = ("model.onnx", "onnx/model.onnx")

# Their positions start after pad_token_id, so two of max_position_embeddings are never used.
# https://github.com/huggingface/transformers/blob/main/src/transformers/models/roberta/modeling_roberta.py
_ROBERTA_LIKE = frozenset({"roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "longformer", "mpnet", "luke"})
_ROBERTA_UNUSED_POSITIONS = 2

# tokenizer_config.json says 10^30 where it means "not limited".
_SANE_MAX_TOKENS = 1 << 24

_MODULES = ("Transformer", "Pooling", "Normalize")
_POOLING_MODES = {
    "pooling_mode_mean_tokens": Pooling.MEAN,
    "pooling_mode_cls_token": Pooling.CLS,
    "pooling_mode_lasttoken": Pooling.LAST,
}


def infer_manifest(root: Path, given: Config = MappingProxyType({})) -> Manifest:
    """
    Return the manifest that the files in `root` suggest, with the fields that `given` has taken from there.

    Raises InvalidBundleError that says what was looked for when `root` holds no model, or what is missing or undecided.
    """
    config = _read(root, "config.json")
    task = given.get("task") or _task(root, config)
    fields: dict[str, object] = {"task": task, "model": given.get("model") or _graph(root)}
    if task != Task.TENSOR:
        fields |= _text(root, config)
    if task == Task.EMBED:
        fields |= _embedding(root, given)
    elif task in (Task.CLASSIFY, Task.ENTITIES):
        fields |= {"labels": _labels(config), "activation": _activation(config)}
    elif task == Task.GENERATE:
        fields |= _generation(root)
    return Manifest.from_mapping({**fields, **given}, source=MANIFEST_FILE if given else "the folder's files")


def _task(root: Path, config: Config) -> Task:
    if (root / GENAI_FILE).is_file():
        return Task.GENERATE
    if (root / "modules.json").is_file():
        return Task.EMBED
    # A vision or audio model has a config too; what its tensors mean is the caller's to know.
    task = next(
        (
            task
            for architecture in _strings(config, "architectures")
            for suffix, task in _TASKS.items()
            if architecture.endswith(suffix)
        ),
        Task.TENSOR,
    )
    if task is Task.CLASSIFY and len(_labels(config)) == 1:
        return Task.RERANK
    if task is Task.EMBED and not (root / TOKENIZER_FILE).is_file():
        return Task.TENSOR
    return task


def _graph(root: Path) -> str:
    decoder = _genai(root).get("decoder")
    preferred = list(_GRAPHS)
    if isinstance(decoder, dict):
        preferred.insert(0, str(decoder.get("filename")))
    for path in preferred:
        if (root / path).is_file():
            return path
    found = sorted(path.relative_to(root).as_posix() for path in (*root.glob("*.onnx"), *root.glob("onnx/*.onnx")))
    if not found:
        raise InvalidBundleError(
            f"{root} holds no model: looked for {', '.join(_GRAPHS)}, any other *.onnx there or in onnx/, and "
            f"{GENAI_FILE}. Export the model to ONNX, or name the folder that has it.",
            field="model",
        )
    if len(found) > 1:
        more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
        raise InvalidBundleError(
            f"{root} holds several graphs: {', '.join(found[:_NAMED])}{more}. Choose one: write a line such as "
            f"`model: {found[0]}` into {MANIFEST_FILE} there.",
            field="model",
        )
    return found[0]


def _genai(root: Path) -> Config:
    model: object = _read(root, GENAI_FILE).get("model", {})
    if not isinstance(model, dict):
        raise InvalidBundleError(f"{root / GENAI_FILE} has no object `model`. Build the model again.", field="model")
    return model


def _generation(root: Path) -> dict[str, object]:
    model = _genai(root)
    found = {
        "max_tokens": model.get("context_length"),
        "vocabulary_size": model.get("vocab_size"),
        "pad_token_id": model.get("pad_token_id"),
    }
    numbers: dict[str, object] = {name: value for name, value in found.items() if isinstance(value, int)}
    return numbers | {"chat_template": _chat_template(root), "special_tokens": _special_tokens(root)}


def _chat_template(root: Path) -> str | None:
    if (root / CHAT_TEMPLATE_FILE).is_file():
        return CHAT_TEMPLATE_FILE
    return TOKENIZER_CONFIG_FILE if _read(root, TOKENIZER_CONFIG_FILE).get("chat_template") else None


def _special_tokens(root: Path) -> dict[str, str]:
    """Return what templates call `bos_token` and so on; a token is a string, or an object with its `content`."""
    given = {key: value for key, value in _read(root, TOKENIZER_CONFIG_FILE).items() if key.endswith("_token")}
    contents = {key: value.get("content") if isinstance(value, dict) else value for key, value in given.items()}
    return {key: value for key, value in contents.items() if isinstance(value, str)}


def _text(root: Path, config: Config) -> dict[str, object]:
    """Return what every model that reads text has."""
    pad = config.get("pad_token_id")
    return {
        "tokenizer": TOKENIZER_FILE if (root / TOKENIZER_FILE).is_file() else None,
        "max_tokens": _max_tokens(root, config),
        "vocabulary_size": config.get("vocab_size"),
        "pad_token_id": pad if isinstance(pad, int) and pad >= 0 else 0,
    }


def _max_tokens(root: Path, config: Config) -> int | None:
    positions = config.get("max_position_embeddings")
    if isinstance(positions, int) and config.get("model_type") in _ROBERTA_LIKE:
        positions -= _ROBERTA_UNUSED_POSITIONS
    limits = (
        positions,
        _read(root, "sentence_bert_config.json").get("max_seq_length"),
        _read(root, TOKENIZER_CONFIG_FILE).get("model_max_length"),
    )
    return min((limit for limit in limits if isinstance(limit, int) and 0 < limit < _SANE_MAX_TOKENS), default=None)


def _embedding(root: Path, given: Config) -> dict[str, object]:
    """Return what sentence-transformers' own files say; a plain encoder is pooled by the mean."""
    modules = _read_list(root, "modules.json")
    folders = {str(module.get("type", "")).rpartition(".")[2]: str(module.get("path", "")) for module in modules}
    pooling = given.get("pooling")
    if not pooling:
        if others := sorted(folders.keys() - set(_MODULES)):
            raise _cannot_pool(root / "modules.json", f"the module {' and '.join(others)}", f"{', '.join(_MODULES)}")
        pooling = _pooling(root / folders.get("Pooling", "1_Pooling"))
    return {"pooling": pooling, "normalize": "Normalize" in folders}


def _pooling(folder: Path) -> Pooling:
    config = _read(folder, "config.json")
    modes = [key for key, value in config.items() if key.startswith("pooling_mode_") and value is True]
    if not modes:
        return Pooling.MEAN
    if len(modes) > 1 or modes[0] not in _POOLING_MODES:
        raise _cannot_pool(folder / "config.json", " and ".join(modes), f"one of {', '.join(_POOLING_MODES)}")
    return _POOLING_MODES[modes[0]]


def _cannot_pool(path: Path, wanted: str, possible: str) -> InvalidBundleError:
    return InvalidBundleError(
        f"{path} asks for {wanted}; {possible} can be served. Export a graph that does all of it and write "
        f"`pooling: model` into {MANIFEST_FILE}.",
        field="pooling",
    )


def _labels(config: Config) -> tuple[str, ...]:
    labels = config.get("id2label")
    if not isinstance(labels, dict):
        return tuple(f"LABEL_{index}" for index in range(int(config.get("num_labels", 0))))
    try:
        ordered = sorted((int(index), str(label)) for index, label in labels.items())
    except ValueError as error:
        raise InvalidBundleError(
            "config.json: id2label has keys that are no numbers. Correct it.", field="labels"
        ) from error
    if [index for index, _ in ordered] != list(range(len(ordered))):
        raise InvalidBundleError(
            f"config.json: id2label numbers {len(ordered)} labels, but not from 0 to {len(ordered) - 1}. Correct it.",
            field="labels",
        )
    return tuple(label for _, label in ordered)


def _activation(config: Config) -> Activation:
    multiple = config.get("problem_type") == "multi_label_classification"
    return Activation.SIGMOID if multiple else Activation.SOFTMAX


def _strings(config: Config, key: str) -> Sequence[str]:
    values = config.get(key) or ()
    return [value for value in values if isinstance(value, str)]


def _read(root: Path, name: str) -> Config:
    """Return a JSON object, empty when there is no such file."""
    value = _parsed(root, name, {})
    if not isinstance(value, dict):
        raise InvalidBundleError(f"{root / name} is no JSON object. Fetch it again.", field=name)
    return value


def _read_list(root: Path, name: str) -> list[Config]:
    """Return a JSON array of objects, empty when there is no such file."""
    value = _parsed(root, name, [])
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        raise InvalidBundleError(f"{root / name} is no JSON array of objects. Fetch it again.", field=name)
    return value


def _parsed(root: Path, name: str, absent: object) -> object:
    try:
        return json.loads((root / name).read_bytes())
    except FileNotFoundError:
        return absent
    except (OSError, ValueError) as error:
        raise InvalidBundleError(f"{root / name} cannot be read: {error}. Fetch it again.", field=name) from error
