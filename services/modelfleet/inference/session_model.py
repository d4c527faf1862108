"""What every model with a session has, whatever its rows are."""

from modelfleet.bundle.manifest import Manifest
from modelfleet.inference.batching import BatchLimits
from modelfleet.inference.canary import Canary
from modelfleet.inference.memory_budget import SessionMemory
from modelfleet.inference.session import RunCancellation, Session
from modelfleet.inference.sharing import UNPROVED
from modelfleet.inference.statistics import ModelRecord


class SessionModel:
    """
    A model as it was loaded, and what its self-test finds out.

    `sharing` says what its rows may share; `canary` is there once it is warmed up; where it has none, `unwatched` says
    why.
    """

    def __init__(self, name: str, manifest: Manifest, session: Session, limits: BatchLimits) -> None:
        self.name = name
        self.manifest = manifest
        self.session = session
        self.record = ModelRecord()
        self.memory = SessionMemory()
        self.sharing = UNPROVED
        self.self_tested = False
        self.canary: Canary | None = None
        self.unwatched = ""
        self._device_limits = limits

    @property
    def notes(self) -> str:
        """What is to be known of it beside that it is READY."""
        return "; ".join(filter(None, (self.sharing.note, self.unwatched)))

    def bound(self, limits: BatchLimits) -> None:
        """Set what a batch may hold on this device."""
        self._device_limits = limits

    def new_cancellation(self) -> RunCancellation:
        """Return what can stop one run."""
        return RunCancellation()
