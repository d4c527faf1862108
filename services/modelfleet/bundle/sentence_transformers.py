"""
What the files of sentence-transformers say of an embedder, of any of its releases: all of it, or a refusal.

modules.json names the steps, each a folder with a config; config_sentence_transformers.json has prompts and the kind of
model; sentence_bert_config.json and its other names have limits. The table of what is honoured is in
docs/model-folders.md. https://sbert.net/docs/sentence_transformer/usage/custom_models.html
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from types import MappingProxyType

from modelfleet.bundle.config_file import ConfigFile, read_json
from modelfleet.bundle.manifest import MANIFEST_FILE, Pooling
from modelfleet.runtime.errors import InvalidBundleError

MODULES_FILE = "modules.json"
LIBRARY_FILE = "config_sentence_transformers.json"
# The library looks for them in this order and takes the first.
LIMITS_FILES = tuple(
    f"sentence_{kind}_config.json"
    for kind in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)

_LIBRARY = "sentence_transformers."
_ORDERS = (("Transformer", "Pooling"), ("Transformer", "Pooling", "Normalize"))
_TRANSFORMER_ALONE = ("Transformer",)

_MODES = MappingProxyType(
    {
        "mean": Pooling.MEAN,
        "cls": Pooling.CLS,
        "lasttoken": Pooling.LAST,
        "max": Pooling.MAX,
        "weightedmean": Pooling.WEIGHTED_MEAN,
        "mean_sqrt_len_tokens": Pooling.MEAN_SQRT_LENGTH,
    }
)
# Before release 5.4, a flag for each.
_FLAGS = MappingProxyType(
    {
        "pooling_mode_cls_token": "cls",
        "pooling_mode_max_tokens": "max",
        "pooling_mode_mean_tokens": "mean",
        "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
        "pooling_mode_weightedmean_tokens": "weightedmean",
        "pooling_mode_lasttoken": "lasttoken",
    }
)
POOLING_KEYS = ("pooling_mode", "embedding_dimension", "word_embedding_dimension", "include_prompt", *_FLAGS)
MODULE_KEYS = ("idx", "name", "path", "type", "kwargs")
# Those of several inputs, and of late interaction, at what they are without them.
LIMITS_KEYS = (
    *("max_seq_length", "do_lower_case", "transformer_task", "modality_config", "module_output_name"),
    *("processing_kwargs", "unpad_inputs", "query_length", "document_length", "query_expansion"),
    *("model_args", "tokenizer_args", "config_args"),
)
LIBRARY_KEYS = (
    *("__version__", "model_type", "prompts", "default_prompt_name", "similarity_fn_name", "truncate_dim"),
    "activation_fn",
)


class Kind(StrEnum):
    """What config_sentence_transformers.json says that a folder is."""

    EMBEDDER = "SentenceTransformer"
    CROSS_ENCODER = "CrossEncoder"


@dataclass(frozen=True, slots=True)
class Module:
    """A step of modules.json: the last part of its class's name, and its folder."""

    name: str
    path: str


def modules(root: Path) -> Sequence[Module]:
    """Return the steps in their order, none where there is no modules.json."""
    found = read_json(root / MODULES_FILE, [])
    if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
        raise InvalidBundleError(
            f"{root / MODULES_FILE} is not a JSON array of objects. Fetch it again.", field=MODULES_FILE
        )
    numbers = [entry.get("idx", index) for index, entry in enumerate(found)]
    ordered = all(type(number) is int for number in numbers) and numbers == sorted(numbers)
    if (root / MODULES_FILE).is_file() and not (found and ordered):
        raise InvalidBundleError(
            f"{root / MODULES_FILE} names no modules, or not in the order of their idx. Correct it.", field=MODULES_FILE
        )
    return [_module(root, entry) for entry in found]


def kind(root: Path) -> Kind | None:
    """Return what the folder says that it is; None where it does not say."""
    config = ConfigFile(root, LIBRARY_FILE)
    said = config.text("model_type")
    if said is not None and said not in list(Kind):
        possible = " or ".join(Kind)
        raise config.refusal("model_type", "cannot be served", f"{possible} can; export it as one of these")
    return Kind(said) if said else None


def cross_encoder(root: Path, steps: Sequence[Module]) -> str | None:
    """Return the activation that the library's file names for a cross-encoder; refuses what else it asks for."""
    if steps and [step.name for step in steps] != ["Transformer"]:
        raise InvalidBundleError(
            f"{root / MODULES_FILE}: the modules of a model that scores are {', '.join(step.name for step in steps)}; "
            "Transformer alone can be served. Export a graph that does all of it.",
            field=MODULES_FILE,
        )
    config = ConfigFile(root, LIBRARY_FILE)
    config.only((*LIBRARY_KEYS, "keep_in_fp32_modules"))
    name = config.text("default_prompt_name")
    if name is not None and (config.object("prompts") or {}).get(name):
        raise config.refusal("default_prompt_name", "cannot be served for pairs", "Write the prompt into your queries")
    return config.text("activation_fn")


def embedding(root: Path, steps: Sequence[Module], *, pooled: bool = False) -> dict[str, object]:
    """
    Return the fields of a manifest that say how token vectors become those of texts.

    Of a graph that is `pooled` otherwise than the files say, only prompts, dimensions and norms are read.
    """
    names = tuple(step.name for step in steps)
    if pooled:
        return {"normalize": "Normalize" in names} | _library(root, keeps_prompt=True)
    _check_normalize(root, steps)
    if steps and names not in _ORDERS:
        orders = "; or ".join(", ".join(order) for order in _ORDERS)
        raise InvalidBundleError(
            f"{root / MODULES_FILE}: the modules are {', '.join(names)}; {orders} can be served. Export a graph that "
            f"does all of it and write `pooling: model` into {MANIFEST_FILE}.",
            field="pooling",
        )
    folder = next((step.path for step in steps if step.name == "Pooling"), "1_Pooling")
    config = ConfigFile(root, f"{folder}/config.json" if folder else "config.json")
    if steps and not config.there:
        raise InvalidBundleError(
            f"{root / MODULES_FILE} names {folder!r} for the pooling, and {config.path} is not there. Fetch it, or "
            f"write `pooling: ...` into {MANIFEST_FILE}.",
            field="pooling",
        )
    fields: dict[str, object] = {"normalize": "Normalize" in names}
    if config.there:
        fields["pooling"] = _pooling(config)
    return fields | _library(root, keeps_prompt=config.flag("include_prompt") is not False)


def limits(root: Path) -> int | None:
    """Return the most tokens of a text, None where no file says it; refuses what else the file asks for."""
    for name in LIMITS_FILES:
        config = ConfigFile(root, name)
        if not config.values:
            continue
        _check_limits(root, config)
        return config.positive("max_seq_length")
    return None


def lower_cases(root: Path) -> bool:
    """Whether tokenizer.json makes texts lower case by itself."""
    return any(
        step.get("type") == "Lowercase" or (step.get("type") == "BertNormalizer" and step.get("lowercase", True))
        for step in normalizers(root)
    )


def normalizers(root: Path) -> Sequence[Mapping[str, object]]:
    """Return the normalizers of tokenizer.json, those within a sequence too."""
    found: list[Mapping[str, object]] = []
    waiting = [ConfigFile(root, "tokenizer.json").object("normalizer")]
    while waiting:
        one = waiting.pop()
        if isinstance(one, Mapping):
            found.append(one)
            inner = one.get("normalizers")
            waiting += inner if isinstance(inner, list) else []
    return found


def _check_limits(root: Path, config: ConfigFile) -> None:
    """Refuse what the file asks for beside the length of texts."""
    config.only(LIMITS_KEYS)
    if config.text("module_output_name") not in (None, "token_embeddings", "logits", "scores"):
        raise config.refusal("module_output_name", "is not pooled here", "Export a graph that pools")
    read = (config.object("modality_config") or {"text": {}}).get("text")
    if not isinstance(read, dict) or read.get("method_output_name") not in (None, "last_hidden_state", "logits"):
        raise config.refusal("modality_config", "is not a text's last hidden state", "Export a graph that pools")
    if config.flag("do_lower_case") and not lower_cases(root):
        raise config.refusal(
            "do_lower_case",
            "tokenizer.json does not do",
            "Add the normalizer Lowercase to tokenizer.json, or say false",
        )
    for key in ("query_length", "document_length", "query_expansion", "unpad_inputs"):
        if config.values.get(key):
            raise config.refusal(key, "cannot be served", "Export the model without it")
    for key in ("model_args", "tokenizer_args", "config_args", "processing_kwargs"):
        if config.object(key):
            raise config.refusal(key, "may change answers", "Apply it when you export, and remove it")
    if config.text("transformer_task") not in (None, "feature-extraction", "sequence-classification"):
        raise config.refusal("transformer_task", "cannot be served", "Export the model for feature-extraction")


def _check_normalize(root: Path, steps: Sequence[Module]) -> None:
    """Raise InvalidBundleError for a norm of anything but the text's vector."""
    for step in steps:
        if step.name == "Normalize" and step.path:
            config = ConfigFile(root, f"{step.path}/config.json")
            for key in config.values:
                if config.text(key) != "sentence_embedding":
                    raise config.refusal(key, "cannot be served", "Only vectors of texts are normalized")


def _pooling(config: ConfigFile) -> Pooling:
    config.only(POOLING_KEYS)
    flagged = [mode for key, mode in _FLAGS.items() if config.flag(key)]
    modes = list(config.strings("pooling_mode")) or flagged
    if config.values.get("pooling_mode") == [] or (flagged and sorted(modes) != sorted(flagged)):
        raise config.refusal("pooling_mode", "is empty, or differs from the flags beside it", "Say one of them")
    key = "pooling_mode" if config.values.get("pooling_mode") else next(iter(config.values.keys() & _FLAGS), "")
    if not modes and key:
        raise InvalidBundleError(
            f"{config.path}: every pooling_mode is off. Say which one holds, or write `pooling: ...` "
            f"into {MANIFEST_FILE}.",
            field="pooling",
        )
    modes = modes or ["mean"]  # the library's default, where the file does not say
    if len(modes) > 1 or modes[0] not in _MODES:
        raise InvalidBundleError(
            f"{config.path} asks for the pooling {' and '.join(modes)}; one of {', '.join(_MODES)} can be served. "
            f"Export a graph that does all of it and write `pooling: model` into {MANIFEST_FILE}.",
            field="pooling",
        )
    return _MODES[modes[0]]


def _library(root: Path, *, keeps_prompt: bool) -> dict[str, object]:
    config = ConfigFile(root, LIBRARY_FILE)
    config.only(LIBRARY_KEYS)
    fields: dict[str, object] = {}
    if (dimensions := config.positive("truncate_dim")) is not None:
        fields["truncate_dimensions"] = dimensions
    prompts = config.object("prompts") or {}
    if (name := config.text("default_prompt_name")) is not None:
        prompt = prompts.get(name)
        if not isinstance(prompt, str):
            raise config.refusal("default_prompt_name", "is not among its prompts", "Correct it")
        if prompt and not keeps_prompt:
            raise config.refusal(
                "default_prompt_name",
                "goes with `include_prompt: false` of the pooling, which cannot be served",
                "Remove the prompt, or export a graph that pools",
            )
        fields["prompt"] = prompt
    elif not keeps_prompt and any(prompts.values()):
        raise config.refusal(
            "prompts",
            "go with `include_prompt: false` of the pooling, which cannot be served",
            "Remove them, or export a graph that pools",
        )
    return fields


def _module(root: Path, entry: Mapping[str, object]) -> Module:
    path = root / MODULES_FILE
    if unknown := sorted(set(entry) - set(MODULE_KEYS)):
        raise InvalidBundleError(
            f"{path}: a module has the key {unknown[0]!r}, which is not known to this release. Remove it if it changes "
            "no answer.",
            field=MODULES_FILE,
        )
    said, folder = entry.get("type"), entry.get("path", "")
    if not isinstance(said, str) or not isinstance(folder, str):
        raise InvalidBundleError(f"{path}: a module lacks its type or its path. Fetch it again.", field=MODULES_FILE)
    name = said.rpartition(".")[2]
    if not said.startswith(_LIBRARY):
        raise InvalidBundleError(
            f"{path}: the module {said!r} is code of its own, which is not run. Export a graph that does all of it and "
            f"write `pooling: model` into {MANIFEST_FILE}.",
            field=MODULES_FILE,
        )
    if entry.get("kwargs"):
        raise InvalidBundleError(
            f"{path}: the module {name} takes arguments of each call (kwargs), which cannot be served. Remove them.",
            field=MODULES_FILE,
        )
    if name == "Transformer" and folder.strip("/"):
        raise InvalidBundleError(
            f"{path} keeps the model in {folder!r}. Move its files (config.json, tokenizer.json, limits) beside "
            f"{MODULES_FILE} and write an empty path there.",
            field=MODULES_FILE,
        )
    return Module(name, folder.strip("/"))
