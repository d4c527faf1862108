"""The inference service: schedules and runs ONNX models, streams generated text."""

import os

# Before the first import of ONNX Runtime. Its packages for Linux would otherwise keep a device id under ~/.cache and
# report models to their maker: https://github.com/microsoft/onnxruntime/blob/main/docs/Privacy.md
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
