"""
Recording golden examples.

A cluster of its own, on this machine and for as long as it takes, runs the graph: recorded is then what the very code
gives that will check it. The bundle is registered there twice: as it is, so that its tokenizer is known, and as a
`tensor` model, whose answers are the graph's raw outputs. Files are shared by both; no manager in use is touched.
A model that generates is asked for the tokens that it takes for likeliest.
"""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from modelfleet.bundle.bundle import GOLDEN_FILE, Bundle
from modelfleet.bundle.directory import open_directory
from modelfleet.bundle.golden import Array, GoldenExample, write_golden
from modelfleet.bundle.golden_text import GoldenText
from modelfleet.bundle.graph import input_types, output_names
from modelfleet.bundle.manifest import Manifest, Task
from modelfleet.client.client import Client
from modelfleet.runtime.errors import InvalidInputError

from modelfleet_tools.cluster import LocalCluster, Service

DEFAULT_TEXTS = (
    "Yes.",
    "My name is Ada Lovelace and I live at 12 St James's Square, London.",
    "The quick brown fox jumps over the lazy dog, then writes to dog@example.org that 3 of 4 hops succeeded.",
    "你好, world! Ça va? 😀",
)
DEFAULT_QUERY = "Where does Ada Lovelace live?"
_LOAD_TIMEOUT_S = 300
_TOKENS = 24

# Of a bundle's files, by their digests.
Paths: TypeAlias = Mapping[str, Path]


@dataclass(frozen=True, slots=True)
class Inputs:
    """What to record: texts (documents, with `query`, for `rerank`), or tensors by example and input name."""

    texts: Sequence[str] = ()
    query: str = DEFAULT_QUERY
    tensors: Mapping[str, Mapping[str, Array]] | None = None


def record_golden(folder: Path, inputs: Inputs, *, device: str = "cpu") -> tuple[GoldenExample, ...]:
    """
    Run the bundle in `folder` on `inputs`, keep them with the outputs as its golden examples, and return them.

    Examples that it had are replaced. Raises InvalidBundleError, InvalidInputError, and what a worker says of a bundle
    that cannot be served.
    """
    bundle, paths = open_directory(folder, with_golden=False)
    with (
        tempfile.TemporaryDirectory(prefix="modelfleet-golden-") as data,
        LocalCluster(Path(data), device=device, flags={Service.INFERENCE: ("--canary-interval-s", "0")}) as cluster,
        Client(
            inference=cluster.addresses.inference,
            tokenizer=cluster.addresses.tokenizer,
            manager=cluster.addresses.manager,
        ) as client,
    ):
        if bundle.manifest.task is Task.GENERATE:
            examples = tuple(_generated(client, bundle, paths, inputs.texts))
        else:
            examples = tuple(_run(client, bundle, paths, inputs, folder / bundle.manifest.model))
    if not examples:
        raise InvalidInputError("There is no example to record. Give texts, or tensors by input name.")
    write_golden(folder / GOLDEN_FILE, examples)
    return examples


def _run(client: Client, bundle: Bundle, paths: Paths, inputs: Inputs, graph: Path) -> Iterator[GoldenExample]:
    """Yield what the graph gives for each input."""
    manifest = bundle.manifest
    raw = replace(bundle, manifest=Manifest(task=Task.TENSOR, model=manifest.model, allow_nan=True))
    outputs = () if manifest.task is Task.TENSOR else (manifest.output or output_names(graph)[0],)
    client.push(bundle, paths, "whole")
    client.push(raw, paths, "raw", alias="stable")
    client.wait_until_served("raw", timeout_s=_LOAD_TIMEOUT_S)
    given = (
        (inputs.tensors or {}).items()
        if manifest.task is Task.TENSOR
        else _text_inputs(client, manifest, inputs, input_types(graph))
    )
    for name, tensors in given:
        yield GoldenExample(name, tensors, client.infer("raw", tensors, outputs=outputs, timeout_s=_LOAD_TIMEOUT_S))


def _generated(client: Client, bundle: Bundle, paths: Paths, texts: Sequence[str]) -> Iterator[GoldenExample]:
    """
    Yield each text and the tokens that are likeliest after it.

    Our own texts are cut to the model's context, and left out where nothing comes after them.
    """
    client.push(bundle, paths, "whole", alias="stable")
    client.wait_until_served("whole", timeout_s=_LOAD_TIMEOUT_S)
    prompts = list(texts or DEFAULT_TEXTS)
    room = max(1, (bundle.manifest.max_tokens or 0) - _TOKENS)
    tokens = client.tokenize("whole", prompts, max_tokens=0 if texts else room)
    for text, ids in zip(prompts, tokens.ids, strict=True):
        call = client.generate(
            "whole", token_ids=ids, max_tokens=_TOKENS, temperature=0, logprobs=True, timeout_s=_LOAD_TIMEOUT_S
        )
        chunks = list(call)
        found = np.array([id_ for chunk in chunks for id_ in chunk.token_ids], np.int32)
        logprobs = np.array([value for chunk in chunks for value in chunk.logprobs], np.float32)
        if len(found):
            yield GoldenText(text, ids, found, logprobs).example()
        elif texts:
            raise InvalidInputError(f"The model generates nothing after {text!r}. Give another text.")


def _text_inputs(
    client: Client, manifest: Manifest, inputs: Inputs, types: Mapping[str, np.dtype]
) -> Iterator[tuple[str, Mapping[str, Array]]]:
    """Yield each text and the graph's inputs for it: one row without padding."""
    texts = list(inputs.texts or DEFAULT_TEXTS)
    max_tokens = manifest.max_tokens or 0
    if manifest.task is Task.RERANK:
        tokens = client.tokenize("whole@1", [inputs.query] * len(texts), texts, max_tokens=max_tokens)
    else:
        tokens = client.tokenize("whole@1", texts, max_tokens=max_tokens)
    for text, ids, type_ids in zip(texts, tokens.ids, tokens.type_ids, strict=True):
        rows: dict[str, npt.NDArray[np.int64]] = {
            "input_ids": ids.astype(np.int64),
            "attention_mask": np.ones(len(ids), np.int64),
            "token_type_ids": type_ids.astype(np.int64),
            "position_ids": np.arange(len(ids)),
        }
        if unknown := types.keys() - rows.keys():
            raise InvalidInputError(f"The graph's inputs {', '.join(sorted(unknown))} are not those of a text model.")
        yield text, {name: rows[name][None].astype(dtype) for name, dtype in types.items()}
