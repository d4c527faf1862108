"""A model opened by onnxruntime-genai: on which device, how its cache grows, and how its engine batches."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnxruntime_genai as og

from modelfleet.bundle.infer import GENAI_FILE
from modelfleet.inference.session import Device, SessionOptions
from modelfleet.inference.tensor_spec import TensorSpec
from modelfleet.runtime.errors import InvalidBundleError, ProviderUnavailableError

_BYTES_OF_A_VALUE = {Device.CPU: 4, Device.CUDA: 2, Device.TENSORRT: 2}
ADAPTER = "adapter"
"""What the library calls the adapter of a model version; each has adapters of its own."""

_PROVIDERS = {Device.CPU: "CPUExecutionProvider", Device.CUDA: "CUDAExecutionProvider"}


@dataclass(frozen=True, slots=True, eq=False)
class GenaiModel:
    """
    The opened model, shared by all engines and generators over it.

    `paged`: its engine joins and leaves requests between steps and cuts long prompts into pieces, which needs a graph
    built with paged attention. Otherwise a batch of at most `batch_rows` runs as a whole.
    """

    model: og.Model
    device: Device
    context: int
    paged: bool
    batch_rows: int
    eos_token_ids: frozenset[int]
    pad_token_ids: frozenset[int]
    cache_bytes_per_token: int
    providers: tuple[str, ...]
    adapters: og.Adapters | None = None
    """Holds ADAPTER, which is laid over the model; the engine knows of none."""
    # It has no tensors that callers see.
    inputs: tuple[TensorSpec, ...] = ()
    outputs: tuple[TensorSpec, ...] = ()


def open_genai(
    directory: Path, options: SessionOptions, *, adapter: str | None = None, opened: og.Model | None = None
) -> GenaiModel:
    """
    Open the model in a bundle's directory, or take one that is `opened` already, and lay an adapter over it.

    Raises InvalidBundleError when the library refuses it, and ProviderUnavailableError when the device that was asked
    for is not there: it never runs on another one instead.
    """
    settings = _settings(directory)
    if options.device is Device.CUDA and not og.is_cuda_available():
        raise ProviderUnavailableError(
            "device is cuda, but this onnxruntime-genai has no CUDA. Install modelfleet[generation-gpu] on a machine "
            "with a GPU, or choose --device cpu."
        )
    if options.device not in _PROVIDERS:
        raise ProviderUnavailableError(
            f"Models of the task 'generate' do not run on {options.device.value}. Use a pool of the device cuda or cpu."
        )
    try:
        model = opened or _model(directory, options)
        capabilities = og.Engine(model).get_capabilities()
    except Exception as error:
        raise InvalidBundleError(f"onnxruntime-genai refuses the model: {error}", field="model") from error
    decoder = settings["model"]["decoder"]
    return GenaiModel(
        model=model,
        device=options.device,
        context=settings["model"]["context_length"],
        paged="dynamic_batching" in settings.get("engine", {}),
        batch_rows=capabilities.configured_max_batch_size,
        eos_token_ids=_ids(settings, "eos_token_id"),
        # Where none is given, the library pads with what ends a text.
        pad_token_ids=_ids(settings, "pad_token_id") or _ids(settings, "eos_token_id"),
        cache_bytes_per_token=_BYTES_OF_A_VALUE[options.device]
        * (2 * decoder["num_hidden_layers"] * decoder["num_key_value_heads"] * decoder["head_size"]),
        providers=(_PROVIDERS[options.device],),
        adapters=_adapters(model, directory / adapter) if adapter else None,
    )


def _model(directory: Path, options: SessionOptions) -> og.Model:
    config = og.Config(str(directory))
    config.clear_providers()
    if options.device is Device.CUDA:
        config.append_provider("cuda")
        config.set_provider_option("cuda", "device_id", str(options.device_id))
    config.overlay(json.dumps(_session_overlay(options)))
    return og.Model(config)


def _adapters(model: og.Model, path: Path) -> og.Adapters:
    try:
        adapters = og.Adapters(model)
        adapters.load(str(path), ADAPTER)
    except Exception as error:
        raise InvalidBundleError(
            f"onnxruntime-genai refuses the adapter {path.name!r}: {error}", field="adapter"
        ) from error
    return adapters


def _settings(directory: Path) -> dict[str, Any]:
    path = directory / GENAI_FILE
    try:
        settings: dict[str, Any] = json.loads(path.read_bytes())
        decoder = settings["model"]["decoder"]
        files = [decoder["filename"]]
        numbers = [decoder[key] for key in ("num_hidden_layers", "num_key_value_heads", "head_size")]
        numbers.append(settings["model"]["context_length"])
        session = decoder.get("session_options") or {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidBundleError(
            f"{GENAI_FILE} cannot be used ({type(error).__name__}: {error}). Build the model with onnxruntime-genai.",
            field="model",
        ) from error
    if not all(isinstance(number, int) and number > 0 for number in numbers):
        raise InvalidBundleError(f"{GENAI_FILE} has sizes that are no positive numbers. Build it again.", field="model")
    # A model is data; this would make it a program.
    if "custom_ops_library" in session:
        raise InvalidBundleError(f"{GENAI_FILE} loads a library of its own, which is not done.", field="model")
    if not all(isinstance(file, str) and (directory / file).resolve().parent == directory.resolve() for file in files):
        raise InvalidBundleError(f"{GENAI_FILE} names files outside of the bundle's folder.", field="model")
    return settings


def _ids(settings: dict[str, Any], name: str) -> frozenset[int]:
    value = settings["model"].get(name, [])
    return frozenset(value if isinstance(value, list) else [value])


def _session_overlay(options: SessionOptions) -> dict[str, Any]:
    session = {
        "intra_op_num_threads": options.threads,
        # Between two steps the threads would spin in wait of the next, and take the CPUs from the services beside.
        "session.intra_op.allow_spinning": "0",
    }
    return {"model": {"decoder": {"session_options": session}}}
