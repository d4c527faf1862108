"""From a checkpoint that writes text, or a GGUF file, to a folder that onnxruntime-genai serves."""

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Literal, TypeAlias

from modelfleet.runtime.errors import InvalidBundleError, InvalidInputError, NotFoundError

from modelfleet_tools.export.quiet import first_line, quiet
from modelfleet_tools.export.widths import Width
from modelfleet_tools.extras import needs_extra

DecoderDevice: TypeAlias = Literal["cpu", "cuda"]

GGUF = ".gguf"
# What the endings of class names tell, as the manifest's inference has it.
_ENDINGS = ("ForCausalLM", "LMHeadModel")
# Those of the builder's that text alone goes into.
_FAMILIES = (
    *("ernie4_5", "gemma", "gemma2", "gemma3_text", "granite", "llama", "mistral", "nemotron", "olmo", "phi", "phi3"),
    *("qwen2", "qwen3", "smollm3"),
)
# A CPU has no kernels of fp16 for attention, and a GPU none of fp32.
_WIDTHS: Mapping[DecoderDevice, tuple[Width, ...]] = MappingProxyType(
    {"cpu": (Width.FP32, Width.INT8, Width.INT4), "cuda": (Width.FP16, Width.INT4)}
)
# At int4, the most sensitive matrices get 8 bits: for an eighth more of a small model's bytes, a quarter less drift.
_OPTIONS: Mapping[Width, tuple[str, ...]] = MappingProxyType({Width.INT4: ("algo_config=k_quant_mixed",)})


def writes_text(source: Path, architectures: object) -> bool:
    """Return whether a source is a decoder: a GGUF file, or a folder of such an architecture."""
    named = architectures if isinstance(architectures, list) else []
    return source.suffix == GGUF or any(str(name).endswith(_ENDINGS) for name in named)


def build_decoder(source: Path, folder: Path, width: Width = Width.INT4, device: DecoderDevice = "cpu") -> None:
    """
    Write the ONNX graph, its data, `genai_config.json`, tokenizer and chat template of a model to `folder`.

    `source` is a Hugging Face folder or a GGUF file. Raises InvalidInputError where the extra [export] is missing or
    the device does not compute in that width, and InvalidBundleError where the model builder fails.
    """
    with opened(source) as checkpoint:
        build(checkpoint, source.name, folder, width, device)


def check_width(width: Width, device: DecoderDevice) -> None:
    """Raise InvalidInputError unless decoders on a device compute in a width."""
    if width not in _WIDTHS[device]:
        raise InvalidInputError(
            f"A model that writes text on {device} has the --precision {' or '.join(_WIDTHS[device])}, not {width}.",
            field="precision",
        )


def build(checkpoint: Path, name: str, folder: Path, width: Width, device: DecoderDevice) -> None:
    """Do so for a folder that `opened` gave; messages call it `name`."""
    check_width(width, device)
    with tempfile.TemporaryDirectory() as temporary:
        built = Path(temporary) / "built"
        command = (
            *(sys.executable, "-m", "onnxruntime_genai.models.builder", "--input", str(checkpoint)),
            *("--output", str(built), "--precision", width.value, "--execution_provider", device),
            *("--cache_dir", str(Path(temporary) / "cache")),
            *(("--extra_options", *_OPTIONS[width]) if width in _OPTIONS else ()),
        )
        # A process of its own: it has no other public interface, and prints a line for each layer.
        done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603  our own words
        if done.returncode:
            said = (done.stderr.strip() or "nothing").splitlines()[-1].replace(str(checkpoint), name)
            raise InvalidBundleError(
                f"onnxruntime-genai's model builder failed on {name}. It said: {said} Can be built: "
                f"{', '.join(_FAMILIES)}.",
                field="architectures",
            )
        shutil.copytree(built, folder, dirs_exist_ok=True)
        shutil.copy(checkpoint / "config.json", folder)


@contextmanager
def opened(source: Path) -> Iterator[Path]:
    """Give a Hugging Face folder: the source itself, or what a GGUF file holds, in fp32. Raises InvalidBundleError."""
    if source.suffix != GGUF:
        yield source
        return
    if not source.is_file():
        raise NotFoundError(f"{source} is no file. Name a GGUF file, or a Hugging Face folder.")
    with tempfile.TemporaryDirectory() as temporary:
        checkpoint = Path(temporary) / "checkpoint"
        with quiet():
            _unpack(source, checkpoint)
        yield checkpoint


def license_of_gguf(path: Path) -> str | None:
    """Return what the file says of its licence."""
    with needs_extra("export"):
        from gguf import GGUFReader  # noqa: PLC0415
    found = GGUFReader(path).get_field("general.license")
    return str(found.contents()) if found else None


def _unpack(gguf: Path, checkpoint: Path) -> None:
    """Write a plain fp32 checkpoint: a model loaded from GGUF says that it is quantized, which the builder refuses."""
    with needs_extra("export"):
        import accelerate  # noqa: F401, PLC0415  what transformers reads a GGUF file with
        import gguf as _  # noqa: F401, PLC0415
        import torch  # noqa: PLC0415
        from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: PLC0415
    try:
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    except Exception as error:  # transformers and gguf raise nearly anything for a file that is damaged
        raise InvalidBundleError(
            f"{gguf} cannot be read as GGUF: {first_line(error)} Fetch it again, or name a Hugging Face folder.",
            field="path",
        ) from error
    config = model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = type(model)(config)
    plain.load_state_dict(model.state_dict())
    plain.save_pretrained(checkpoint)
    tokenizer.save_pretrained(checkpoint)
