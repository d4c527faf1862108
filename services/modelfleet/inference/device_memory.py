"""How much memory of a GPU is free, asked of the CUDA runtime that ONNX Runtime has loaded: no library beside it."""

import ctypes

# The runtime's versions that builds of ONNX Runtime come with, newest first.
_RUNTIMES = ("libcudart.so.13", "libcudart.so.12", "libcudart.so.11.0")


def free_device_memory(device_id: int) -> int | None:
    """Return the free bytes of a GPU, those of all processes considered; None where there is no CUDA runtime."""
    for name in _RUNTIMES:
        try:
            runtime = ctypes.CDLL(name)
        except OSError:
            continue
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        # Both return 0 for success. The device is the calling thread's own choice.
        # https://docs.nvidia.com/cuda/cuda-runtime-api/group__CUDART__MEMORY.html
        if not runtime.cudaSetDevice(device_id) and not runtime.cudaMemGetInfo(ctypes.byref(free), ctypes.byref(total)):
            return free.value
    return None
