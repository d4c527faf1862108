"""Encoders of a Hugging Face folder as sources: one tensor out, whose meaning the task gives."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import yaml
from modelfleet.bundle.infer import TOKENIZER_FILE, infer_manifest
from modelfleet.bundle.manifest import MANIFEST_FILE, Manifest, Task
from modelfleet.runtime.errors import InvalidBundleError, InvalidInputError

from modelfleet_tools.export.bundle_folder import notices
from modelfleet_tools.export.quiet import first_line, quiet
from modelfleet_tools.export.source import BATCH, MAX_BATCH, Axis, Source
from modelfleet_tools.export.text_rows import DEFAULT_TEXTS, TextRows

if TYPE_CHECKING:
    import torch

SEQUENCE = "sequence"

# Exported by our tests, or of the same code in transformers as one that is.
FAMILIES = (
    *("albert", "bert", "camembert", "deberta", "deberta-v2", "distilbert", "electra", "mpnet", "roberta"),
    *("xlm-roberta",),
)

_CLASSES: Mapping[Task, tuple[str, str]] = MappingProxyType(
    {
        Task.EMBED: ("AutoModel", "last_hidden_state"),
        Task.CLASSIFY: ("AutoModelForSequenceClassification", "logits"),
        Task.RERANK: ("AutoModelForSequenceClassification", "logits"),
        Task.ENTITIES: ("AutoModelForTokenClassification", "logits"),
    }
)
_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
# A pooler is beside what is exported, and positions are counted, not trained.
_UNUSED_WEIGHTS = re.compile(r"(^|\.)pooler\.|position_ids$|token_type_ids$")
_KEPT_FILES = ("config.json", "tokenizer_config.json", "special_tokens_map.json")


def open_encoder(
    folder: Path, *, task: Task | None = None, labels: Sequence[str] = (), license_name: str | None = None
) -> Source:
    """
    Read an encoder and its tokenizer from a Hugging Face folder. Nothing is fetched.

    Without a task, config.json tells it. Raises InvalidBundleError, saying what can be exported, for a folder without a
    model, another architecture, or weights that lack the task's head.
    """
    config = _config(folder)
    given = _given(folder) | {"model": "model.onnx"}
    given |= {"task": task} if task else {}
    given |= {"labels": list(labels)} if labels else {}
    name = license_name or given.get("license") or license_of_card(folder)
    given |= {"license": name} if name else {}
    kind, asked = str(config.get("model_type")), given.get("task")
    if kind not in FAMILIES or asked in (Task.TENSOR, Task.GENERATE):
        raise _cannot(folder, config, asked)
    files = _files(folder)
    manifest = _manifest(folder, given)
    if manifest.task not in _CLASSES:
        raise _cannot(folder, config, manifest.task)
    module, names = _module(folder, manifest)
    axes = {0: Axis(BATCH, 1, MAX_BATCH), 1: Axis(SEQUENCE, 1, manifest.max_tokens or 1)}
    rows = TextRows(_content(files[TOKENIZER_FILE]), manifest, names)
    inputs = rows.batch(DEFAULT_TEXTS)
    if manifest.vocabulary_size and (largest := int(inputs["input_ids"].max())) >= manifest.vocabulary_size:
        raise InvalidBundleError(
            f"{TOKENIZER_FILE} gives the id {largest}, and the model knows {manifest.vocabulary_size} tokens. They are "
            "not of one model: fetch both again.",
            field="tokenizer",
        )
    return Source(
        module=module,
        inputs=inputs,
        outputs=(_CLASSES[manifest.task][1],),
        axes=dict.fromkeys(names, axes),
        manifest=manifest.model_dump(mode="json", exclude_defaults=True),
        files=files,
    )


def license_of_card(folder: Path) -> str | None:
    """Return what the head of a model card says, `license: apache-2.0`."""
    try:
        card = (folder / "README.md").read_text(errors="replace")
    except OSError:
        return None
    head = re.match(r"---\n(.*?)\n---", card, re.DOTALL)
    found = head and re.search(r"^license:[ \t]*(\S+)", head[1], re.MULTILINE)
    return found[1] if found else None


def _config(folder: Path) -> Mapping[str, Any]:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InvalidBundleError(
            f"{folder} holds no model: it has no config.json. Name a Hugging Face folder, or a torch module by "
            "--module PACKAGE.MODULE:FACTORY.",
            field="path",
        ) from error
    except (OSError, ValueError) as error:
        raise InvalidBundleError(f"{path} cannot be read: {error}. Fetch it again.", field="path") from error
    if not isinstance(config, dict):
        raise InvalidBundleError(f"{path} is no JSON object. Fetch it again.", field="path")
    return config


def _given(folder: Path) -> dict[str, Any]:
    try:
        given = yaml.safe_load((folder / MANIFEST_FILE).read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise InvalidBundleError(f"{folder / MANIFEST_FILE} cannot be read: {error}.", field=MANIFEST_FILE) from error
    return dict(given) if isinstance(given, dict) else {}


def _manifest(folder: Path, given: Mapping[str, Any]) -> Manifest:
    # The folder may have its tokenizer in another form, from which tokenizer.json is made.
    given = {**given, "tokenizer": TOKENIZER_FILE}
    found = infer_manifest(folder, given)
    if found.task is Task.TENSOR:  # an encoder whose architecture tells no task gives vectors
        return infer_manifest(folder, {**given, "task": Task.EMBED})
    return found


def _cannot(folder: Path, config: Mapping[str, Any], task: object) -> InvalidBundleError:
    names = ", ".join(config.get("architectures") or ()) or "no architecture named"
    wanted = f" for the task {task}" if task else ""
    return InvalidBundleError(
        f"{folder} is of the family {config.get('model_type')!r} ({names}), which cannot be exported{wanted}. "
        f"Can be: {', '.join(FAMILIES)} for {', '.join(_CLASSES)}; models that write text for generate; and any other "
        "torch module by --module PACKAGE.MODULE:FACTORY.",
        field="architectures",
    )


def _module(folder: Path, manifest: Manifest) -> tuple[torch.nn.Module, tuple[str, ...]]:
    class_name, output = _CLASSES[manifest.task]
    with quiet():
        import torch  # noqa: PLC0415  torch is needed by exports alone
        import transformers  # noqa: PLC0415

        try:
            model, loading = getattr(transformers, class_name).from_pretrained(
                folder,
                attn_implementation="eager",
                dtype=torch.float32,
                local_files_only=True,
                output_loading_info=True,
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise InvalidBundleError(
                f"transformers cannot load {folder} as {class_name}: {first_line(error)}", field="path"
            ) from error
    missing = sorted(key for key in loading["missing_keys"] if not _UNUSED_WEIGHTS.search(key))
    if missing:
        raise InvalidBundleError(
            f"{folder} was not trained for {manifest.task.value}: its weights lack {', '.join(missing[:4])}. Export it "
            "for the task that it has, or train a head on it with `modelfleet train`.",
            field="task",
        )
    _check_labels(model.config.num_labels, manifest)
    accepted = inspect.signature(model.forward).parameters
    types = getattr(model.config, "type_vocab_size", 0) or 0
    names = tuple(name for name in _INPUTS if name in accepted and (name != "token_type_ids" or types > 1))

    class Encoder(torch.nn.Module):  # type: ignore[misc]  # torch is not there when types are checked
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *tensors: torch.Tensor) -> Any:
            return getattr(self.model(**dict(zip(names, tensors, strict=True))), output)

    return Encoder().eval(), names


def _check_labels(outputs: int, manifest: Manifest) -> None:
    if manifest.task in (Task.CLASSIFY, Task.ENTITIES) and len(manifest.labels) != outputs:
        raise InvalidInputError(
            f"The model has {outputs} outputs, and {len(manifest.labels)} labels are given: "
            f"{', '.join(manifest.labels)}. Give one label for each output, in their order.",
            field="labels",
        )


def _files(folder: Path) -> dict[str, bytes | Path]:
    files: dict[str, bytes | Path] = {name: folder / name for name in _KEPT_FILES if (folder / name).is_file()}
    files |= {path.name: path for path in notices(folder)}
    tokenizer = folder / TOKENIZER_FILE
    files[TOKENIZER_FILE] = tokenizer if tokenizer.is_file() else _converted_tokenizer(folder)
    return files


def _converted_tokenizer(folder: Path) -> bytes:
    with quiet():
        from transformers import AutoTokenizer  # noqa: PLC0415

        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            content: str = tokenizer.backend_tokenizer.to_str()
        except Exception as error:  # transformers raises nearly anything for a tokenizer that is not there
            raise InvalidBundleError(
                f"{folder} has no tokenizer.json, and transformers can make none: {first_line(error)}. Add it.",
                field="tokenizer",
            ) from error
    return content.encode()


def _content(file: bytes | Path) -> bytes:
    return file if isinstance(file, bytes) else file.read_bytes()
