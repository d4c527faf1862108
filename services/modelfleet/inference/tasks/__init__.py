"""From a session's outputs to results: pure functions on numpy arrays."""
