"""From labelled texts and a served base to a bundle that classifies."""

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from modelfleet.bundle.infer import TOKENIZER_FILE
from modelfleet.bundle.manifest import Manifest, Task
from modelfleet.client.client import Client
from modelfleet.runtime.errors import InternalError, InvalidInputError

from modelfleet_tools.export.bundle_folder import GRAPH_FILE, write_examples, write_manifest
from modelfleet_tools.export.drift import answers
from modelfleet_tools.export.graph import Graph
from modelfleet_tools.export.text_rows import TextRows
from modelfleet_tools.labelled_texts import LabelledTexts
from modelfleet_tools.train.base import Base, download, embed_texts
from modelfleet_tools.train.fusion import OUTPUT, fuse
from modelfleet_tools.train.head import Head, Split, logits, train_head

_SEED = 20260101
_LEAST_TEXTS = 10
_COMPARED = 32
# Of a probability: the fused graph pools in another order, and the served base may run in other batches.
_TOLERANCE = 0.02
_KEPT = ("tokenizer_config.json", "special_tokens_map.json", "README.md", "LICENSE", "NOTICE")


@dataclass(frozen=True, slots=True)
class Splits:
    """What is trained on, what ends the training, and what is held out until the end."""

    train: LabelledTexts
    validation: LabelledTexts
    test: LabelledTexts

    @property
    def parts(self) -> tuple[LabelledTexts, LabelledTexts, LabelledTexts]:
        """All three."""
        return self.train, self.validation, self.test


@dataclass(frozen=True, slots=True)
class Settings:
    """`hidden` is the size of a hidden layer, 0 for none."""

    hidden: int = 0
    epochs: int = 200
    patience: int = 10


@dataclass(frozen=True, slots=True)
class Trained:
    """How good the head is on the test split, how many texts were cut to fit, how long each part took in seconds."""

    base: str
    labels: tuple[str, ...]
    texts: dict[str, int]
    cut: int
    epochs: int
    best_epoch: int
    validation_loss: float
    accuracy: float
    f1: float
    fused_difference: float
    embed_s: float
    train_s: float


def split(data: LabelledTexts, share: float) -> tuple[LabelledTexts, LabelledTexts]:
    """Return data without a random share of each label, and that share."""
    generator = np.random.default_rng(_SEED)
    labels = np.array(data.labels)
    held: list[int] = []
    for label in sorted(set(data.labels)):
        indices = generator.permutation(np.flatnonzero(labels == label))
        held += indices[: max(1, round(len(indices) * share))].tolist()
    left = sorted(set(range(len(data))) - set(held))
    return data.at(left), data.at(sorted(held))


def train(
    client: Client,
    manager: str | None,
    base: Base,
    *,
    splits: Splits,
    settings: Settings,
    folder: Path,
    embedding: Callable[[int], None],
    epoch: Callable[[int, float], None],
) -> Trained:
    """
    Train a head and write the fused bundle into `folder`, which is empty.

    `embedding` hears how many more texts are embedded, `epoch` each epoch and its validation loss. Raises
    InvalidInputError for labels that differ between the splits, and what the services say.
    """
    labels = _checked_labels(splits)
    started = time.monotonic()
    embedded = embed_texts(client, base, [text for part in splits.parts for text in part.texts], embedding)
    embed_s = time.monotonic() - started
    numbers = {label: number for number, label in enumerate(labels)}
    ends = np.cumsum([len(part) for part in splits.parts])
    fit, check, held = (
        Split(vectors, np.array([numbers[label] for label in part.labels], np.int64))
        for vectors, part in zip(np.split(embedded.vectors, ends[:-1]), splits.parts, strict=True)
    )
    started = time.monotonic()
    head = train_head(
        fit,
        check,
        labels=len(labels),
        hidden=settings.hidden,
        epochs=settings.epochs,
        patience=settings.patience,
        progress=epoch,
    )
    train_s = time.monotonic() - started
    manifest = _write(base, manager, labels, head, folder)
    difference = _compare(folder, manifest, head, splits.test, held)
    accuracy, f1 = _scores(held.labels, logits(head, held.vectors).argmax(axis=1))
    return Trained(
        base.reference,
        labels,
        {"train": len(splits.train), "validation": len(splits.validation), "test": len(splits.test)},
        embedded.cut,
        head.epochs,
        head.best_epoch,
        head.validation_loss,
        accuracy,
        f1,
        difference,
        round(embed_s, 1),
        round(train_s, 1),
    )


def _checked_labels(splits: Splits) -> tuple[str, ...]:
    labels = tuple(sorted(set(splits.train.labels)))
    if len(labels) < 2:  # noqa: PLR2004  one label is no question
        raise InvalidInputError(f"The data has {len(labels)} label; a head needs two or more.", field="labels")
    for name, part in (("validation", splits.validation), ("test", splits.test)):
        if unknown := sorted(set(part.labels) - set(labels)):
            raise InvalidInputError(
                f"The {name} split has the labels {', '.join(unknown)}, which the training split lacks: it has "
                f"{', '.join(labels)}. Make them the same.",
                field="labels",
            )
        if not part.labels:
            raise InvalidInputError(f"The {name} split is empty. Give more data.")
    if len(splits.train) < _LEAST_TEXTS:
        raise InvalidInputError(f"{len(splits.train)} texts are left to train on; give at least {_LEAST_TEXTS}.")
    return labels


def _write(base: Base, manager: str | None, labels: tuple[str, ...], head: Head, folder: Path) -> Manifest:
    with tempfile.TemporaryDirectory(prefix="modelfleet-base-") as temporary:
        files = Path(temporary)
        download(base, manager, files)
        fuse(files / base.manifest.model, base.manifest, head.layers, folder / GRAPH_FILE)
        (folder / TOKENIZER_FILE).write_bytes((files / (base.manifest.tokenizer or TOKENIZER_FILE)).read_bytes())
        for file in base.version.files:
            if file.path in _KEPT or file.path.startswith(("LICENSE", "NOTICE")):
                (folder / file.path).write_bytes((files / file.path).read_bytes())
    manifest = Manifest(
        task=Task.CLASSIFY,
        model=GRAPH_FILE,
        tokenizer=TOKENIZER_FILE,
        max_tokens=base.manifest.max_tokens,
        vocabulary_size=base.manifest.vocabulary_size,
        pad_token_id=base.manifest.pad_token_id,
        output=OUTPUT,
        labels=labels,
        license=base.manifest.license,
    )
    write_manifest(manifest, folder)
    return manifest


def _compare(folder: Path, manifest: Manifest, head: Head, texts: LabelledTexts, vectors: Split) -> float:
    """Return how far the fused graph's probabilities are from the head's on served vectors; record golden examples."""
    graph = Graph(folder / GRAPH_FILE)
    rows = TextRows((folder / TOKENIZER_FILE).read_bytes(), manifest, graph.inputs)
    inputs = [(text[:80], rows.batch([text])) for text in texts.texts[:_COMPARED]]
    write_examples(graph, inputs, folder)
    wanted = logits(head, vectors.vectors[:_COMPARED])
    far = max(
        float(np.abs(answers(manifest, row, graph.run(row)[OUTPUT]) - answers(manifest, row, wanted[[index]])).max())
        for index, (_, row) in enumerate(inputs)
    )
    if far > _TOLERANCE:
        raise InternalError(
            f"The fused graph's probabilities are off those of the served base and head by {far:.3g}; {_TOLERANCE:g} "
            "is tolerated. Was the base exported with another pooling than its manifest says?"
        )
    return far


def _scores(wanted: np.ndarray, found: np.ndarray) -> tuple[float, float]:
    from sklearn.metrics import accuracy_score, f1_score  # noqa: PLC0415  takes a second to import

    return float(accuracy_score(wanted, found)), float(f1_score(wanted, found, average="macro"))
