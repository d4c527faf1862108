"""What each step of an export costs and gives: size, speed on this machine, drift, accuracy."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from modelfleet.bundle.golden import Array
from modelfleet.bundle.manifest import Manifest

from modelfleet_tools.export.drift import drift
from modelfleet_tools.export.quality import Labelled, Quality, quality
from modelfleet_tools.export.source import Inputs
from modelfleet_tools.output import print_table

_ROUNDS = 3
_ROUND_S = 0.25


@dataclass(frozen=True, slots=True)
class Step:
    """
    One form of the model.

    `size` is in bytes, `rows_per_s` the best of a few turns on this machine, `drift` the largest change of an answer
    against the source. `accuracy` and `f1` (macro) are None without labelled data.
    """

    name: str
    size: int
    rows_per_s: float
    drift: float
    accuracy: float | None
    f1: float | None


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


def print_steps(steps: Sequence[Step]) -> None:
    """Write the report as a table."""
    first = steps[0]
    rows = [
        (
            step.name,
            f"{step.size / 1e6:.2f} MB",
            f"{step.rows_per_s:.1f}",
            f"{step.rows_per_s / first.rows_per_s:.2f}",
            f"{step.drift:.2g}",
            *(("" if value is None else f"{value:.4f}") for value in (step.accuracy, step.f1)),
        )
        for step in steps
    ]
    print_table("Steps", ("step", "size", "rows/s", "times the source", "drift", "accuracy", "F1"), rows)


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
