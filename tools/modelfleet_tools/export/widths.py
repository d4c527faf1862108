"""What a graph's numbers may be."""

from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType


class Width(StrEnum):
    """What a graph's numbers are."""

    FP32 = "fp32"
    FP16 = "fp16"
    INT8 = "int8"
    """Weights, and activations while a multiplication lasts."""
    INT4 = "int4"
    """Weights of matrices, in blocks of 32."""


# Of answers, as `drift` measures them.
MAX_DRIFT: Mapping[Width, float] = MappingProxyType(
    {Width.FP32: 0.001, Width.FP16: 0.01, Width.INT8: 0.08, Width.INT4: 0.15}
)
# Of the next token, as `next_tokens` measures it: small models drift most.
MAX_TOKEN_DRIFT: Mapping[Width, float] = MappingProxyType(
    {Width.FP32: 0.001, Width.FP16: 0.02, Width.INT8: 0.06, Width.INT4: 0.25}
)
