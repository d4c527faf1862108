"""The manifest of a folder in Hugging Face layout, read from the files that lie in it."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias

from modelfleet.bundle import sentence_transformers, transformers_config
from modelfleet.bundle.config_file import ConfigFile
from modelfleet.bundle.manifest import MANIFEST_FILE, Activation, Manifest, Pooling, Task
from modelfleet.bundle.sentence_transformers import Kind
from modelfleet.bundle.transformers_config import CONFIG_FILE, TOKENIZER_CONFIG_FILE
from modelfleet.runtime.errors import InvalidBundleError

Config: TypeAlias = Mapping[str, Any]

GENAI_FILE = "genai_config.json"
TOKENIZER_FILE = "tokenizer.json"
CHAT_TEMPLATE_FILE = "chat_template.jinja"

_NAMED = 8
_GRAPHS = ("model.onnx", "onnx/model.onnx")


def infer_manifest(root: Path, given: Config = MappingProxyType({})) -> Manifest:
    """
    Return the manifest that the files in `root` suggest, with the fields that `given` has taken from there.

    What a file says is honoured, or refused where `given` does not say it: raises InvalidBundleError that says what was
    looked for when `root` holds no model, or names the file, the key and the remedy.
    """
    config = ConfigFile(root, CONFIG_FILE)
    task = given.get("task") or _task(root, config)
    fields: dict[str, object] = {"task": task, "model": given.get("model") or _graph(root)}
    if task not in (Task.TENSOR, Task.GENERATE):
        transformers_config.check_tokenizer(root)
    if task != Task.TENSOR:
        fields |= _text(root, config, given)
    if task == Task.EMBED:
        fields |= _embedding(root, given)
    elif task in (Task.CLASSIFY, Task.ENTITIES):
        fields |= _labelling(root, config, given)
    elif task == Task.RERANK:
        said = sentence_transformers.cross_encoder(root, sentence_transformers.modules(root))
        raw = not given.get("activation") and transformers_config.relevance(config, said, 1) is Activation.NONE
        fields |= {"activation": Activation.NONE} if raw else {}
    elif task == Task.GENERATE:
        fields |= _generation(root)
    return Manifest.from_mapping({**fields, **given}, source=MANIFEST_FILE if given else "the folder's files")


def _task(root: Path, config: ConfigFile) -> Task:
    if (root / GENAI_FILE).is_file():
        return Task.GENERATE
    steps = sentence_transformers.modules(root)
    kind = sentence_transformers.kind(root)
    of_config = transformers_config.task(config)
    if of_config is Task.ENTITIES and (steps or kind):
        raise config.refusal(
            "architectures", "labels tokens, beside modules that embed", f"Write `task:` into {MANIFEST_FILE}"
        )
    if kind is Kind.EMBEDDER or (steps and kind is None and of_config is not Task.CLASSIFY):
        return Task.EMBED
    # A vision or audio model has a config too; what its tensors mean is the caller's to know.
    if of_config is None or (of_config is Task.EMBED and not (root / TOKENIZER_FILE).is_file()):
        return Task.TENSOR
    if of_config is Task.CLASSIFY and (
        transformers_config.is_cross_encoder(config)
        or (kind is Kind.CROSS_ENCODER and len(transformers_config.labels(config)) == 1)
    ):
        return Task.RERANK
    return of_config


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


def _text(root: Path, config: ConfigFile, given: Config) -> dict[str, object]:
    """Return what every model that reads text has."""
    pad = config.integer("pad_token_id")
    limits = (sentence_transformers.limits(root), *transformers_config.text_limits(root, config))
    return {
        "tokenizer": TOKENIZER_FILE if (root / TOKENIZER_FILE).is_file() else None,
        "max_tokens": given.get("max_tokens") or min((limit for limit in limits if limit), default=None),
        "vocabulary_size": config.positive("vocab_size"),
        "pad_token_id": max(pad or 0, 0),
    }


def _embedding(root: Path, given: Config) -> dict[str, object]:
    """Return what sentence-transformers' own files say; a plain encoder is pooled by the mean."""
    steps, pooled = sentence_transformers.modules(root), bool(given.get("pooling"))
    return {"pooling": Pooling.MEAN} | sentence_transformers.embedding(root, steps, pooled=pooled)


def _labelling(root: Path, config: ConfigFile, given: Config) -> dict[str, object]:
    labels = given.get("labels") or transformers_config.labels(config)
    said = sentence_transformers.cross_encoder(root, sentence_transformers.modules(root))
    if given.get("activation"):
        return {"labels": labels}
    if said or sentence_transformers.kind(root) is Kind.CROSS_ENCODER:
        return {"labels": labels, "activation": transformers_config.relevance(config, said, len(labels))}
    return {"labels": labels, "activation": transformers_config.activation(config, len(labels))}


def _read(root: Path, name: str) -> Config:
    return ConfigFile(root, name).values
