"""What each step of an export costs and gives: size, speed on this machine, drift, accuracy."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from modelfleet.bundle.golden import Array
from modelfleet.bundle.manifest import Manifest

from modelfleet_tools.export.drift import drift
from modelfleet_tools.export.graph import Exported
from modelfleet_tools.export.parity import Parity
from modelfleet_tools.export.quality import Labelled, Quality, quality
from modelfleet_tools.export.source import Inputs
from modelfleet_tools.output import print_table

_ROUNDS = 3
_ROUND_S = 0.25


@dataclass(frozen=True, slots=True)
class Step:
    """
    One form of the model.

    `size` is in bytes, `per_s` the best of a few turns on this machine, of rows, or for `generate` of tokens that one
    stream writes; `drift` says how far answers are from the source's. Both are None for what does not run here.
    `accuracy` and `f1` (macro) are None without labelled data.
    """

    name: str
    size: int
    per_s: float | None
    drift: float | None
    accuracy: float | None = None
    f1: float | None = None


@dataclass(frozen=True, slots=True)
class Report:
    """What was made, and what each step of it costs and gives. `parity` is None for what could not be run here."""

    folder: str
    task: str
    license: str | None
    exported: Exported
    parity: Parity | None
    pruned: str | None
    steps: tuple[Step, ...]


@dataclass(frozen=True, slots=True)
class Form:
    """A form of the model to be measured: how it runs, and its bytes."""

    name: str
    run: Callable[[Inputs], Mapping[str, Array]]
    size: int


def measure(forms: Sequence[Form], manifest: Manifest, batches: Sequence[Inputs], data: Labelled | None) -> list[Step]:
    """Measure all forms on the same batches, in turns; the first one is what the others are held against."""
    speeds = _speeds(forms, batches[0])
    recorded = [forms[0].run(batch) for batch in batches]
    steps = []
    for form in forms:
        far = max(
            drift(manifest, batch, before, form.run(batch)) for batch, before in zip(batches, recorded, strict=True)
        )
        found = quality(form.run, manifest, data) if data else Quality(None, None)
        steps.append(Step(form.name, form.size, round(speeds[form.name], 1), max(0.0, far), found.accuracy, found.f1))
    return steps


def print_steps(steps: Sequence[Step], what: str) -> None:
    """Write the report as a table; `what` is counted per second."""
    first = steps[0].per_s
    rows = [
        (
            step.name,
            f"{step.size / 1e6:.2f} MB",
            "" if step.per_s is None else f"{step.per_s:.1f}",
            f"{step.per_s / first:.2f}" if step.per_s and first else "",
            "not measured" if step.drift is None else f"{step.drift:.2g}",
            *(f"{value:.4f}" for value in (step.accuracy, step.f1) if value is not None),
        )
        for step in steps
    ]
    quality_columns = () if steps[0].accuracy is None else ("accuracy", "F1")
    print_table("Steps", ("step", "size", f"{what}/s", "times the source", "drift", *quality_columns), rows)


def _speeds(forms: Sequence[Form], batch: Inputs) -> dict[str, float]:
    rows = len(next(iter(batch.values())))
    best = dict.fromkeys((form.name for form in forms), 0.0)
    for form in forms:
        form.run(batch)  # the first run allocates
    for _ in range(_ROUNDS):
        for form in forms:
            started, runs = time.perf_counter(), 0
            while (taken := time.perf_counter() - started) < _ROUND_S or not runs:
                form.run(batch)
                runs += 1
            best[form.name] = max(best[form.name], runs * rows / taken)
    return best
