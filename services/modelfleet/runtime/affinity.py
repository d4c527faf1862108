"""The affinity key: what a caller names to be answered by one version throughout a canary, such as a user's id."""

from contextvars import ContextVar

AFFINITY_HEADER = "x-modelfleet-affinity"

affinity_key: ContextVar[str] = ContextVar("affinity_key", default="")
"""Of the call under way; empty for none."""
