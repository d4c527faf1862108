"""`modelfleet export | verify`."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeAlias

import typer
from modelfleet.bundle.manifest import Task
from rich.console import Console
from rich.progress import Progress

from modelfleet_tools.export.decoders import DecoderDevice
from modelfleet_tools.export.widths import Width
from modelfleet_tools.extras import needs_extra
from modelfleet_tools.options import JsonOption
from modelfleet_tools.output import print_json, tell

if TYPE_CHECKING:
    from modelfleet_tools.export.origin import Origin
    from modelfleet_tools.export.report import Report

_SourceArgument: TypeAlias = Annotated[
    Path | None, typer.Argument(metavar="[SOURCE]", help="A Hugging Face folder with weights, or a .gguf file.")
]
_ModuleOption: TypeAlias = Annotated[
    str | None,
    typer.Option("--module", metavar="PACKAGE.MODULE:FACTORY", help="A function that returns a torch module instead."),
]
_TaskOption: TypeAlias = Annotated[
    Task | None, typer.Option(help="What the model answers; config.json tells where this is left out.")
]
_LabelsOption: TypeAlias = Annotated[str | None, typer.Option(help="Labels in the order of the outputs, with commas.")]


def export(
    source: _SourceArgument = None,
    *,
    out: Annotated[Path, typer.Option(file_okay=False, help="The bundle's folder, to be made.")],
    module: _ModuleOption = None,
    task: _TaskOption = None,
    labels: _LabelsOption = None,
    license_name: Annotated[
        str | None, typer.Option("--license", help="The weights' licence; the model card tells where left out.")
    ] = None,
    precision: Annotated[Width, typer.Option(help="What numbers the graph computes with.")] = Width.FP32,
    optimize: Annotated[
        bool, typer.Option("--optimize", help="Fuse operators beforehand; on a CPU, sessions do so by themselves.")
    ] = False,
    prune: Annotated[
        float, typer.Option(metavar="FRACTION", min=0, max=0.95, help="Leave out the smallest neurons or weights.")
    ] = 0,
    max_drift: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Fail past it [fp32 0.001, fp16 0.01, int8 0.08, int4 0.15; none when pruned; of models that write "
            "text fp16 0.02, int8 0.06, int4 0.25].",
        ),
    ] = None,
    data: Annotated[str | None, typer.Option(help="Labelled texts: each step is measured on them, too.")] = None,
    text_column: Annotated[str, typer.Option(help="Of --data.")] = "text",
    label_column: Annotated[str, typer.Option(help="Of --data.")] = "label",
    device: Annotated[DecoderDevice, typer.Option(help="What a model that writes text is built for.")] = "cpu",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is at --out.")] = False,
    as_json: JsonOption = False,
) -> None:
    """
    Write a torch model as a bundle: graph, manifest, tokenizer, licence, golden examples.

    The graph is compared with the model at shapes from 1 to the largest. Each step is reported with its size, its speed
    on this machine, and the drift of its answers: 1 - cosine of vectors, change of probabilities, or of raw tensors the
    difference as a share of the largest. Models that write text are built by onnxruntime-genai; their drift is how
    often a next token that is drawn comes out as another.

    Examples: modelfleet export ./my-bert --task classify --precision int8 --out bundle;
    modelfleet export SmolLM2.gguf --precision int4 --out smollm2;
    modelfleet export --module tools.examples.cnn_image_classifier:digits --out digits
    """
    with needs_extra("export"):
        from modelfleet_tools.export.compression import Compression  # noqa: PLC0415  imports what [export] has
        from modelfleet_tools.export.exporting import export as run  # noqa: PLC0415
        from modelfleet_tools.labelled_texts import read_labelled  # noqa: PLC0415

        origin = _origin(source, module, task, labels, license_name)
        texts = read_labelled(data, text_column=text_column, label_column=label_column) if data else None
        compression = Compression(precision, optimize, prune, max_drift, device)
        report = run(origin, out, compression, data=texts, overwrite=overwrite, tell=tell)
    if as_json:
        print_json(asdict(report))
        return
    print_report(report)
    print(out)


def print_report(report: "Report") -> None:
    """Write what an export made, for people."""
    from modelfleet_tools.export.report import print_steps  # noqa: PLC0415  imports ONNX Runtime

    print_steps(report.steps, "tokens" if report.task == Task.GENERATE else "rows")
    how = f"Exported by {report.exported.exporter}, opset {report.exported.opset}"
    if report.parity:
        tell(f"{how}; off its source by {report.parity.worst:.2g} at most, at {report.parity.shapes} shapes.")
    else:
        tell(f"{how}. It does not run on this machine: compare it where it does, with `modelfleet verify`.")
    if report.exported.fallback:
        tell(f"Not by the first exporter: {report.exported.fallback}")
    if report.pruned:
        tell(f"Left out: {report.pruned}.")
    if not report.license:
        tell("No licence was found. Name it with --license.")


def verify(
    folder: Annotated[Path, typer.Argument(metavar="DIR", exists=True, file_okay=False, help="The bundle's folder.")],
    *,
    source: Annotated[Path | None, typer.Option(exists=True, help="The source; the bundle's record names it.")] = None,
    module: _ModuleOption = None,
    task: _TaskOption = None,
    labels: _LabelsOption = None,
    as_json: JsonOption = False,
) -> None:
    """
    Compare a bundle's graph with the model that it was exported from, on real and random inputs of every length.

    Example: modelfleet verify bundle
    """
    with needs_extra("export"):
        from modelfleet_tools.export.exporting import verify as run  # noqa: PLC0415  imports torch

        origin = _origin(source, module, task, labels, None) if source or module else None
        bar = Progress(console=Console(stderr=True), transient=True)
        bar.disable = not bar.console.is_terminal
        with bar:
            line = bar.add_task("Comparing", total=None)
            found, far = run(folder, origin, progress=lambda done, total: bar.update(line, completed=done, total=total))
    if as_json:
        print_json({"parity": asdict(found), "drift": far})
        return
    shape = ", ".join(f"{name} {size}" for name, size in found.worst_shape.items())
    print(f"{folder}: {found.shapes} shapes, largest difference {found.worst:.2g} at {shape}; answers drift {far:.2g}")


def _origin(
    source: Path | None, module: str | None, task: Task | None, labels: str | None, license_name: str | None
) -> "Origin":
    from modelfleet_tools.export.origin import Origin  # noqa: PLC0415  imports what [export] has

    if (source is None) == (module is None):
        raise typer.BadParameter("Give SOURCE, or --module.")
    named = tuple(label.strip() for label in labels.split(",")) if labels else ()
    folder = str(source) if source else None
    return Origin(folder, module, task.value if task else None, named, license_name)
