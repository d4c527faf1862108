"""The `modelfleet` command, and what tests and measurements share with it."""

import os

# Before the first import of ONNX Runtime, as in modelfleet.inference: nothing is sent to its maker.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
