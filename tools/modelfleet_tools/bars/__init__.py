"""The project's own bars: the whole cluster beside a bare ONNX Runtime loop, in turns within one run."""
