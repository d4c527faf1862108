"""Any torch module as a source, by the name of a function that makes it."""

import importlib
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from modelfleet.runtime.errors import InvalidInputError

from modelfleet_tools.export.quiet import quiet
from modelfleet_tools.export.source import Source

_FORM = "PACKAGE.MODULE:FACTORY"


def open_module(name: str, *, license_name: str | None = None) -> Source:
    """
    Call the factory that `package.module:factory` names; modules in the current folder are found, too.

    It returns a Source, or a pair of a torch module and its example inputs, by name in the order of `forward`, which
    makes a `tensor` model with a batch as the first dimension. Raises InvalidInputError for anything else.
    """
    source = _as_source(_call(name), name)
    small = {key: list(array.shape) for key, array in source.inputs.items() if not array.shape or array.shape[0] < 2}  # noqa: PLR2004  exporters take a size of 1 for a constant
    if small or not source.inputs:
        raise InvalidInputError(f"{name} gives example inputs of the shapes {small}. Give each at least two elements.")
    source.module.eval()
    if license_name:
        source = replace(source, manifest={**source.manifest, "license": license_name})
    return source


def _call(name: str) -> object:
    module_name, separator, factory_name = name.partition(":")
    if not separator or not module_name or not factory_name:
        raise InvalidInputError(f"{name!r} names no factory. Write {_FORM}, such as examples.cnn:digits.")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        with quiet():
            factory: Any = getattr(importlib.import_module(module_name), factory_name)
    except ImportError as error:
        raise InvalidInputError(f"{module_name} cannot be imported: {error}. Write {_FORM}.") from error
    except AttributeError as error:
        raise InvalidInputError(f"{module_name} has no {factory_name}. Write {_FORM}.") from error
    if not callable(factory):
        raise InvalidInputError(f"{name} is no function. Name one that takes nothing and returns the module.")
    made: object = factory()
    return made


def _as_source(made: object, name: str) -> Source:
    import torch  # noqa: PLC0415  torch is needed by exports alone

    match made:
        case Source():
            return made
        case (torch.nn.Module() as module, Mapping() as inputs):
            return Source(module, {str(key): np.asarray(value) for key, value in inputs.items()})
    raise InvalidInputError(
        f"{name} returned a {type(made).__name__}. Return a modelfleet_tools.export.source.Source, or a torch module "
        "and a dict of its example inputs."
    )
