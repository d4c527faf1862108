"""Whether a call that was cancelled had run out of time."""

# A caller ends its call by its own clock. The deadline is a little later here: gRPC rounds timeouts up on their way,
# by less than 1%, and messages take their time.
_SHARE = 0.02
_MOMENT_S = 0.02


def ran_out(elapsed_s: float, left_s: float) -> bool:
    """Return whether one that ends after `elapsed_s`, `left_s` before its deadline, ends for the deadline's sake."""
    return left_s < _SHARE * (elapsed_s + left_s) + _MOMENT_S
