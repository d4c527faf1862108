"""
What a session takes of memory and gives back: `make memory`.

Loads, runs and drops each graph three times in one process, for each way to keep or return memory, and prints resident
megabytes: before, at the peak of loading, loaded, at the largest batch, after dropping it, and after `malloc_trim`.
"""

import gc
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import numpy as np
import onnxruntime as ort
import typer
from modelfleet.runtime.memory import peak_memory, reset_peak_memory, resident_memory, return_free_memory
from modelfleet_tools.output import print_table

_GRAPHS = (Path(".cache/minilm-fp32/model.onnx"), Path(".cache/samples/pii/onnx/model_q4.onnx"))
_CYCLES = 3
_LARGEST = (2, 256)  # 512 tokens, the default budget on a CPU
_SHRINK = "memory.enable_memory_arena_shrinkage"
_WAYS = ("arena", "no-arena", "shrink")


def measure(graph: Path, way: str) -> None:
    """Print a line of figures for each cycle."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 2
    options.enable_mem_pattern = False
    options.enable_cpu_mem_arena = way != "no-arena"
    for _ in range(_CYCLES):
        figures = [resident_memory()]
        reset_peak_memory()
        session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        figures += [peak_memory(), resident_memory()]
        run_options = ort.RunOptions()
        if way == "shrink":
            run_options.add_run_config_entry(_SHRINK, "cpu:0")
        inputs = {node.name: np.ones(_LARGEST, np.int64) for node in session.get_inputs()}
        reset_peak_memory()
        session.run(None, inputs, run_options)
        figures.append(peak_memory())
        del session
        gc.collect()
        figures.append(resident_memory())
        return_free_memory()
        figures.append(resident_memory())
        typer.echo(" ".join(map(str, figures)))


def main(
    graph: Annotated[Path | None, typer.Argument(help="Another graph of a text model.")] = None,
    way: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Measure the samples, or one graph."""
    if graph and way:
        measure(graph, way)
        return
    rows = []
    for one in [graph] if graph else [path for path in _GRAPHS if path.exists()]:
        for kind in _WAYS:
            # A process each: what one leaves behind would count for the next.
            command = (sys.executable, __file__, str(one), "--way", kind)
            lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
            for cycle, line in enumerate(lines, 1):
                rows.append((one.name, kind, cycle, *(round(int(figure) / 1e6) for figure in line.split())))
    columns = ("graph", "way", "cycle", "before", "load peak", "loaded", "run peak", "dropped", "trimmed")
    print_table("Resident memory of a process with one session, MB", columns, rows)


if __name__ == "__main__":
    typer.run(main)
