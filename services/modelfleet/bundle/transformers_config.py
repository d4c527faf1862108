"""What config.json and tokenizer_config.json of the transformers library say of a model that reads text."""

from collections.abc import Sequence
from pathlib import Path
from types import MappingProxyType

from modelfleet.bundle.config_file import ConfigFile
from modelfleet.bundle.manifest import MANIFEST_FILE, Activation, Task
from modelfleet.bundle.sentence_transformers import normalizers
from modelfleet.runtime.errors import InvalidBundleError

CONFIG_FILE = "config.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"

# By the end of a class name of the library, the first that fits.
_TASKS = MappingProxyType(
    {
        "ForTokenClassification": Task.ENTITIES,
        "ForSequenceClassification": Task.CLASSIFY,
        "ForCausalLM": Task.GENERATE,
        "LMHeadModel": Task.GENERATE,
        "ForMaskedLM": Task.EMBED,
        "EncoderModel": Task.EMBED,
        "Model": Task.EMBED,
    }
)
_ACTIVATIONS = MappingProxyType(
    {
        "single_label_classification": Activation.SOFTMAX,
        "multi_label_classification": Activation.SIGMOID,
        "regression": Activation.NONE,
    }
)
# Of cross-encoders, by the last part of its name.
_ACTIVATION_FUNCTIONS = MappingProxyType(
    {"Sigmoid": Activation.SIGMOID, "Identity": Activation.NONE, "Softmax": Activation.SOFTMAX}
)
_OF_RELEVANCE = frozenset({"label_0", "relevance", "relevant", "score"})
# What the library takes where the file has neither labels nor their number.
_DEFAULT_LABELS = ("LABEL_0", "LABEL_1")

# tokenizer_config.json says 10^30 where it means "not limited".
_SANE_MAX_TOKENS = 1 << 24
# What numbers of positions are multiples of.
_ROUND = 64
# Where the number alone does not tell.
_BEHIND_PADDING = frozenset({"roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "longformer", "mpnet", "luke"})
# What the library's BERT tokenizers take from there over what tokenizer.json says, and what it is called there.
_BERT_NORMALIZATION = MappingProxyType(
    {"do_lower_case": "lowercase", "strip_accents": "strip_accents", "tokenize_chinese_chars": "handle_chinese_chars"}
)


def task(config: ConfigFile) -> Task | None:
    """Return the task of the architectures; None where they, or the kinds of input, are none of text's."""
    found = {
        name: one
        for name in config.strings("architectures")
        if (one := next((task for suffix, task in _TASKS.items() if name.endswith(suffix)), None))
    }
    if len(set(found.values())) > 1:
        raise config.refusal(
            "architectures",
            "names models of different tasks",
            f"Write a line such as `task: embed` into {MANIFEST_FILE}",
        )
    if not found:
        return None
    name, one = next(iter(found.items()))
    if one is Task.EMBED:
        _check_encoder(config, name)
    return one


def labels(config: ConfigFile) -> tuple[str, ...]:
    """Return the labels in the order of the outputs. Two, as in the library, where the file does not say."""
    by_id, count = config.object("id2label"), config.integer("num_labels")
    if by_id is None:
        return _DEFAULT_LABELS if count is None else tuple(f"LABEL_{index}" for index in range(count))
    try:
        ordered = sorted((int(index), label) for index, label in by_id.items())
    except ValueError:
        raise config.refusal("id2label", "has keys that are not numbers", "Correct it") from None
    if [index for index, _ in ordered] != list(range(len(ordered))):
        raise config.refusal("id2label", f"does not number its labels from 0 to {len(ordered) - 1}", "Correct it")
    if not all(isinstance(label, str) for _, label in ordered):
        raise config.refusal("id2label", "has labels that are not strings", "Correct it")
    if count is not None and count != len(ordered):
        raise config.refusal("num_labels", f"differs from the {len(ordered)} labels of id2label", "Correct one of them")
    return tuple(label for _, label in ordered)


def activation(config: ConfigFile, count: int) -> Activation:
    """Return how `count` logits become scores: as `problem_type` says, or as the library's pipeline chooses."""
    said = config.text("problem_type")
    if said is None:
        return Activation.SIGMOID if count == 1 else Activation.SOFTMAX
    if said not in _ACTIVATIONS:
        raise config.refusal("problem_type", f"is not one of {', '.join(_ACTIVATIONS)}", "Correct it")
    return _ACTIVATIONS[said]


def relevance(config: ConfigFile, said: str | None, count: int) -> Activation:
    """Return how `count` logits of a cross-encoder become scores: as files say, else one by a sigmoid, several not."""
    nested = said or (config.object("sentence_transformers") or {}).get("activation_fn")
    key = "sbert_ce_default_activation_function" if nested is None else "sentence_transformers"
    said = config.text(key) if nested is None else nested
    if said is None:
        regression = config.text("problem_type") == "regression"
        return Activation.NONE if regression or count > 1 else Activation.SIGMOID
    found = _ACTIVATION_FUNCTIONS.get(str(said).rpartition(".")[2])
    if found not in (Activation.SIGMOID, Activation.NONE):
        raise config.refusal(key, "asks for an activation that cannot be served", "Sigmoid and Identity can")
    return found


def is_cross_encoder(config: ConfigFile) -> bool:
    """Whether one score is a relevance: a cross-encoder wrote the file, or its label is none, or says relevance."""
    saved = config.values.get("sentence_transformers") or config.values.get("sbert_ce_default_activation_function")
    found = labels(config)
    return len(found) == 1 and (bool(saved) or found[0].lower() in _OF_RELEVANCE)


def check_tokenizer(root: Path) -> None:
    """Raise InvalidBundleError for what tokenizer_config.json says of tokens that tokenizer.json does not do."""
    tokenizer = ConfigFile(root, TOKENIZER_CONFIG_FILE)
    _check_normalization(root, tokenizer)
    if tokenizer.text("truncation_side") == "left":
        raise tokenizer.refusal(
            "truncation_side", "is not the default here", "Say right, and ask for truncation from the left in requests"
        )


def text_limits(root: Path, config: ConfigFile) -> Sequence[int | None]:
    """Return what the files say of the most tokens of a text."""
    tokenizer = ConfigFile(root, TOKENIZER_CONFIG_FILE)
    longest = tokenizer.values.get("model_max_length")
    if isinstance(longest, float) and longest >= _SANE_MAX_TOKENS:
        longest = None  # 1e30, as some files write it
    elif longest is not None:
        longest = tokenizer.positive("model_max_length")
    return [limit if limit is None or 0 < limit < _SANE_MAX_TOKENS else None for limit in (_positions(config), longest)]


def _positions(config: ConfigFile) -> int | None:
    """
    Return how many tokens have a position.

    Where positions begin behind the padding's id, as in RoBERTa and its kin, a config counts those before, too: 514 for
    512. https://github.com/huggingface/transformers/blob/main/src/transformers/models/roberta/modeling_roberta.py
    A worker tries what the graph takes, but a GPU looks up what is not there without an error.
    """
    positions, pad = config.integer("max_position_embeddings"), config.values.get("pad_token_id")
    if not positions:
        return positions
    pad = pad if isinstance(pad, int) and pad > 0 else 0
    if config.text("model_type") in _BEHIND_PADDING:
        return positions - (pad or 1) - 1
    uneven = pad and positions % _ROUND and not (positions - pad - 1) % _ROUND
    return positions - pad - 1 if uneven else positions


def _check_encoder(config: ConfigFile, name: str) -> None:
    """Raise InvalidBundleError for a model whose vectors are not those of an encoder of text, pooled."""
    if name.endswith("ForMaskedLM"):
        return  # the graph tells: it may have an output of hidden states
    for key, kind in (("text_config", "of several kinds of input"), ("is_encoder_decoder", "with a decoder")):
        if config.values.get(key):
            raise InvalidBundleError(
                f"{config.path}: {name} is a model {kind} ({key}), whose vectors are not its tokens' pooled. "
                f"Write `task: tensor` into {MANIFEST_FILE} to serve its tensors, or `task: embed` with `output:` and "
                "`pooling:` where the graph has vectors of texts.",
                field="task",
            )


def _check_normalization(root: Path, tokenizer: ConfigFile) -> None:
    bert = next((step for step in normalizers(root) if step.get("type") == "BertNormalizer"), None)
    if bert is None:
        return
    for key, called in _BERT_NORMALIZATION.items():
        said = tokenizer.flag(key)
        if (
            said is not None
            and bert.get(called, said) != said
            and not (called == "strip_accents" and bert[called] is None)
        ):
            raise tokenizer.refusal(
                key,
                f"differs from tokenizer.json, where {called} is {bert.get(called)}",
                "Save the tokenizer again with one of them",
            )
