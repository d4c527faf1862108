"""The kinds of loaded models."""

from modelfleet.inference.generation.model import GenerativeModel
from modelfleet.inference.tensor_model import TensorModel
from modelfleet.inference.text_model import TextModel

LoadedModel = TextModel | TensorModel
HeldModel = LoadedModel | GenerativeModel

__all__ = ["HeldModel", "LoadedModel", "TensorModel", "TextModel"]
