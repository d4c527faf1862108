"""`modelfleet embed | classify | entities | rerank`."""

from collections.abc import Sequence
from typing import Annotated, Literal, TypeAlias

import numpy as np
import typer
from modelfleet.client.answers import ExtractedEntities, TextUsage
from modelfleet.client.inference_calls import Truncation

from modelfleet_tools.options import DEFAULT_TIMEOUT_S, InferenceOption, JsonOption, TimeoutOption, open_client
from modelfleet_tools.output import print_json, print_table, shortened, tell
from modelfleet_tools.texts import InputOption, read_texts

_SHOWN_DIMENSIONS = 4

ModelArgument: TypeAlias = Annotated[str, typer.Argument(metavar="MODEL", help="NAME, NAME@ALIAS or NAME@NUMBER.")]
TextsArgument: TypeAlias = Annotated[
    list[str] | None, typer.Argument(metavar="[TEXT]...", help="Texts; without any, the lines of --input.")
]
WindowOption: TypeAlias = Annotated[
    int | None,
    typer.Option(
        "--window-stride", min=0, help="Cover texts that are too long with windows that share so many tokens."
    ),
]


TruncationOption: TypeAlias = Annotated[
    Truncation, typer.Option("--truncation", help="Which end of a text that is too long is cut, or fail instead.")
]


def embed(
    model: ModelArgument,
    texts: TextsArgument = None,
    *,
    source: InputOption = None,
    normalize: Annotated[bool | None, typer.Option(help="Scale vectors to length 1; else as the model says.")] = None,
    dimensions: Annotated[int, typer.Option(min=0, help="Keep so many leading dimensions; 0 keeps all.")] = 0,
    truncation: TruncationOption = "right",
    window_stride: WindowOption = None,
    inference: InferenceOption = None,
    timeout: TimeoutOption = DEFAULT_TIMEOUT_S,
    as_json: JsonOption = False,
) -> None:
    """
    Turn texts into vectors.

    Example: modelfleet embed minilm "first text" "second text" --json
    """
    given = read_texts(texts, source)
    with open_client(inference=inference, timeout_s=timeout) as client:
        answer = client.embed(
            model,
            given,
            normalize=normalize,
            dimensions=dimensions,
            truncation=truncation,
            window_stride=window_stride,
        )
    if as_json:
        print_json(answer)
        return
    rows = (
        (
            shortened(text),
            _tokens(usage),
            " ".join(f"{value:+.4f}" for value in vector[:_SHOWN_DIMENSIONS]) + " …",
            float(np.linalg.norm(vector)),
        )
        for text, vector, usage in zip(given, answer.vectors, answer.usage, strict=True)
    )
    title = f"{answer.model}@{answer.model_version}: {answer.vectors.shape[1]} dimensions"
    print_table(title, ("text", "tokens", "vector", "length"), rows)
    _warn_of_cuts(answer.usage)


def classify(
    model: ModelArgument,
    texts: TextsArgument = None,
    *,
    source: InputOption = None,
    top_k: Annotated[int, typer.Option(min=0, help="Keep the best labels of each text; 0 keeps all.")] = 0,
    truncation: TruncationOption = "right",
    window_stride: WindowOption = None,
    inference: InferenceOption = None,
    timeout: TimeoutOption = DEFAULT_TIMEOUT_S,
    as_json: JsonOption = False,
) -> None:
    """
    Score the labels of texts.

    Example: modelfleet classify toxicity --input comments.txt --top-k 1 --json
    """
    given = read_texts(texts, source)
    with open_client(inference=inference, timeout_s=timeout) as client:
        answer = client.classify(model, given, top_k=top_k, truncation=truncation, window_stride=window_stride)
    if as_json:
        print_json(answer)
        return
    rows = (
        ("" if index else shortened(text), label.label, label.score)
        for text, result in zip(given, answer.results, strict=True)
        for index, label in enumerate(result.labels)
    )
    print_table(f"{answer.model}@{answer.model_version}", ("text", "label", "score"), rows)
    _warn_of_cuts([result.usage for result in answer.results])


def entities(
    model: ModelArgument,
    texts: TextsArgument = None,
    *,
    source: InputOption = None,
    min_score: Annotated[float, typer.Option(min=0, max=1, help="Leave out entities that score lower.")] = 0,
    aggregation: Annotated[
        Literal["simple", "first", "max", "average"] | None,
        typer.Option(help="How the labels of a word's pieces become the word's; as the model says when absent."),
    ] = None,
    truncation: TruncationOption = "right",
    window_stride: WindowOption = None,
    inference: InferenceOption = None,
    timeout: TimeoutOption = DEFAULT_TIMEOUT_S,
    as_json: JsonOption = False,
) -> None:
    """
    Find labelled spans in texts.

    Example: modelfleet entities pii "My name is Ada Lovelace." --window-stride 32
    """
    given = read_texts(texts, source)
    with open_client(inference=inference, timeout_s=timeout) as client:
        answer = client.extract_entities(
            model,
            given,
            min_score=min_score,
            aggregation=aggregation,
            truncation=truncation,
            window_stride=window_stride,
        )
    if as_json:
        print_json(answer)
        return
    print_entities(given, answer)
    _warn_of_cuts([result.usage for result in answer.results])


def rerank(
    model: ModelArgument,
    documents: TextsArgument = None,
    *,
    query: Annotated[str, typer.Option("--query", "-q", help="What the documents are to be relevant to.")],
    source: InputOption = None,
    top_k: Annotated[int, typer.Option(min=0, help="Keep the best documents; 0 keeps all.")] = 0,
    raw_scores: Annotated[bool, typer.Option("--raw-scores", help="The model's raw scores, not 0 to 1.")] = False,
    truncation: TruncationOption = "right",
    window_stride: WindowOption = None,
    inference: InferenceOption = None,
    timeout: TimeoutOption = DEFAULT_TIMEOUT_S,
    as_json: JsonOption = False,
) -> None:
    """
    Order documents by relevance to a query.

    Example: modelfleet rerank reranker -q "capital of France" "Paris is the capital." "Rome is in Italy."
    """
    given = read_texts(documents, source)
    with open_client(inference=inference, timeout_s=timeout) as client:
        answer = client.rerank(
            model,
            query,
            given,
            top_k=top_k,
            raw_scores=raw_scores,
            truncation=truncation,
            window_stride=window_stride,
        )
    if as_json:
        print_json(answer)
        return
    rows = ((document.score, document.index, shortened(given[document.index], 100)) for document in answer.documents)
    print_table(f"{answer.model}@{answer.model_version}", ("score", "index", "document"), rows)
    _warn_of_cuts([document.usage for document in answer.documents])


def print_entities(texts: Sequence[str], answer: ExtractedEntities) -> None:
    """Print a table of the entities of each text."""
    rows: list[tuple[object, ...]] = []
    for text, result in zip(texts, answer.results, strict=True):
        found = [(one.text, one.label, one.score, f"{one.start}-{one.end}") for one in result.entities]
        for index, row in enumerate(found or [("none", "", "", "")]):
            rows.append(("" if index else shortened(text), *row))
    columns = ("text", "entity", "label", "score", "characters")
    print_table(f"{answer.model}@{answer.model_version}", columns, rows)


def _tokens(usage: TextUsage) -> str:
    cut = ", cut" if usage.truncated else ""
    windows = f" in {usage.window_count} windows" if usage.window_count > 1 else ""
    return f"{usage.token_count}{windows}{cut}"


def _warn_of_cuts(usages: Sequence[TextUsage]) -> None:
    if cut := sum(usage.truncated for usage in usages):
        tell(f"{cut} of {len(usages)} texts were cut to fit the model. Cover them with windows: --window-stride 32")
