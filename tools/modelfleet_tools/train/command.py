"""`modelfleet train`."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from modelfleet.bundle.reference import check_alias_name, check_model_name
from modelfleet.runtime.errors import InvalidInputError
from rich.console import Console
from rich.progress import Progress

from modelfleet_tools.export.bundle_folder import new_folder
from modelfleet_tools.extras import needs_extra
from modelfleet_tools.labelled_texts import LabelledTexts, read_labelled
from modelfleet_tools.options import InferenceOption, JsonOption, ManagerOption, open_client
from modelfleet_tools.output import print_json, print_table, tell
from modelfleet_tools.pushing import push_folder

_PUSH_S = 600
_MODELS = Path(".cache/trained")


def train(
    *,
    base: Annotated[str, typer.Option(help="A served `embed` model.")],
    data: Annotated[str, typer.Option(help="Texts and labels: JSONL, CSV or Parquet.")],
    name: Annotated[str, typer.Option("--name", "-n", help="The new model's name.")],
    validation: Annotated[str | None, typer.Option(help="The split that ends the training [10% of --data].")] = None,
    test: Annotated[str | None, typer.Option(help="The split that is held out until the end [10% of --data].")] = None,
    text_column: Annotated[str, typer.Option(help="The column with the text.")] = "text",
    label_column: Annotated[str, typer.Option(help="The column with the label.")] = "label",
    hidden: Annotated[int, typer.Option(min=0, help="Size of a hidden layer; 0 for a linear head.")] = 128,
    epochs: Annotated[int, typer.Option(min=1, help="Most epochs.")] = 200,
    patience: Annotated[int, typer.Option(min=1, help="Stop so many epochs after the best one.")] = 10,
    out: Annotated[
        Path | None, typer.Option(file_okay=False, help=f"The bundle's folder, to be made [{_MODELS}/NAME].")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is at --out.")] = False,
    alias: Annotated[str | None, typer.Option(help="Point this alias at the version; `stable` serves it.")] = None,
    min_accuracy: Annotated[
        float, typer.Option(min=0, max=1, help="Do not push a head that is worse on the test split.")
    ] = 0,
    manager: ManagerOption = None,
    inference: InferenceOption = None,
    timeout: Annotated[float, typer.Option(metavar="SECONDS", min=0.001, help="Longest wait for one answer.")] = 120,
    as_json: JsonOption = False,
) -> None:
    """
    Train a classifier on a served base and push it as one model.

    The base embeds the texts; a head is trained on the vectors, fused with the base into one graph, and measured on the
    test split.

    Example: modelfleet train --base minilm --data train.csv --test test.csv --name injection --alias stable
    """
    check_model_name(name)
    if alias:
        check_alias_name(alias)
    folder = out or _MODELS / name
    rest = _read(data, text_column, label_column)
    with (
        needs_extra("export"),
        new_folder(folder, overwrite=overwrite) as fresh,
        open_client(manager=manager, inference=inference, timeout_s=timeout) as client,
    ):
        from modelfleet_tools.train import training  # noqa: PLC0415  imports what [export] has
        from modelfleet_tools.train.base import find_base  # noqa: PLC0415

        if test:
            held = _read(test, text_column, label_column)
        else:
            rest, held = training.split(rest, 0.1)
        if validation:
            checked = _read(validation, text_column, label_column)
        else:
            rest, checked = training.split(rest, 0.1)
        splits = training.Splits(rest, checked, held)
        bar = Progress(console=Console(stderr=True), transient=True)
        bar.disable = not bar.console.is_terminal
        with bar:
            line = bar.add_task("Embedding", total=len(rest) + len(checked) + len(held))
            found = training.train(
                client,
                manager,
                find_base(client, base),
                splits=splits,
                settings=training.Settings(hidden, epochs, patience),
                folder=fresh,
                embedding=lambda count: bar.advance(line, count),
                epoch=lambda number, loss: bar.update(line, description=f"Epoch {number}, validation loss {loss:.4f}"),
            )
        if found.accuracy < min_accuracy:
            raise InvalidInputError(
                f"The head's accuracy on the test split is {found.accuracy:.4f}; {min_accuracy:g} is asked for. It was "
                "not pushed."
            )
    with open_client(manager=manager, inference=inference) as client:
        pushed = push_folder(client, folder, name, alias, timeout_s=_PUSH_S)
    version = pushed.model_version.model_version
    if as_json:
        print_json({"model": name, "model_version": version, "alias": alias, "folder": str(folder), **asdict(found)})
        return
    rows = [(part, count) for part, count in found.texts.items()]
    print_table("Texts", ("split", "texts"), rows)
    if found.cut:
        tell(f"{found.cut} texts were cut to fit the base; the head learnt from, and will see, their beginnings.")
    tell(f"Embedded in {found.embed_s} s, trained in {found.train_s} s: {found.best_epoch} of {found.epochs} epochs.")
    print(f"{name}@{version}: accuracy {found.accuracy:.4f}, F1 {found.f1:.4f} on the test split")


def _read(url: str, text_column: str, label_column: str) -> LabelledTexts:
    return read_labelled(url, text_column=text_column, label_column=label_column)
