"""Which rows of a model share batches, and what is known of that."""

from dataclasses import dataclass

from modelfleet.bundle.manifest import Batching

# Beyond what kernels of other sizes round otherwise: quantization by the scales of a whole batch.
_SHOWS = 0.005


@dataclass(frozen=True, slots=True)
class Sharing:
    """What rows share; the largest `deviation` that was found then of an answer in company from the answer alone."""

    batching: Batching
    deviation: float = 0.0
    """As a share of the answer's largest magnitude."""
    reason: str = ""
    """Why they do not share more, as the end of a sentence; empty where they share all that they could."""

    @property
    def note(self) -> str:
        """Say so where rows share less than they could, and what company changes where that shows."""
        match self.batching:
            case Batching.ALONE:
                said = "rows run alone"
            case Batching.SAME_SHAPE if self.reason:
                said = "only rows of equal length share batches"
            case _ if self.deviation > _SHOWS:
                return f"company changes answers by up to {self.deviation:.2g} of their magnitude"
            case _:
                return ""
        return f"{said}: {self.reason}"


UNPROVED = Sharing(Batching.ALONE, reason="nothing is known of it yet")
