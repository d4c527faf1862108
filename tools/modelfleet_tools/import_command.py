"""The command line of `modelfleet import`."""

from pathlib import Path
from typing import Annotated

import typer
from modelfleet.bundle.manifest import Task

from modelfleet_tools.export.commands import print_report
from modelfleet_tools.export.decoders import DecoderDevice
from modelfleet_tools.export.widths import Width
from modelfleet_tools.extras import needs_extra
from modelfleet_tools.importing import fetch, keep_graph
from modelfleet_tools.options import JsonOption
from modelfleet_tools.output import print_json, tell


def import_model(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="hf://ORGANISATION/NAME[@REVISION], or a folder.")],
    *,
    out: Annotated[Path, typer.Option(file_okay=False, help="The bundle's folder, to be made.")],
    graph: Annotated[
        str | None, typer.Option(help="Which graph, such as onnx/model_int8.onnx [model.onnx, onnx/model.onnx].")
    ] = None,
    task: Annotated[Task | None, typer.Option(help="For an export: what the model answers.")] = None,
    precision: Annotated[Width, typer.Option(help="For an export: what numbers the graph computes with.")] = Width.FP32,
    device: Annotated[DecoderDevice, typer.Option(help="For an export: what a model that writes text is for.")] = "cpu",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is at --out.")] = False,
    as_json: JsonOption = False,
) -> None:
    """
    Fetch a model of the Hugging Face hub as a bundle: its ONNX graph, or where it has none, its weights exported.

    HF_ENDPOINT and HF_TOKEN name another hub and a token; a local folder needs neither.

    Example: modelfleet import hf://sentence-transformers/all-MiniLM-L6-v2 --out minilm
    """
    found = fetch(source, graph, tell)
    if found.graph:
        keep_graph(found, out, overwrite=overwrite)
    else:
        with needs_extra("export"):
            from modelfleet_tools.export.compression import Compression  # noqa: PLC0415  imports what [export] has
            from modelfleet_tools.export.exporting import export  # noqa: PLC0415
            from modelfleet_tools.export.origin import Origin  # noqa: PLC0415

            origin = Origin(folder=str(found.folder), task=task.value if task else None)
            compression = Compression(precision, device=device)
            report = export(origin, out, compression, overwrite=overwrite, tell=tell)
            if not as_json:
                print_report(report)
    if as_json:
        print_json({"source": source, "revision": found.revision, "graph": found.graph, "folder": str(out)})
        return
    print(out)
