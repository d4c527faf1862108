"""From a GGUF file to a folder that onnxruntime-genai serves."""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from modelfleet.runtime.errors import InvalidBundleError

from modelfleet_tools.export.quiet import quiet
from modelfleet_tools.extras import needs_extra


def build_decoder(gguf: Path, folder: Path, precision: str = "int4") -> None:
    """
    Write the ONNX graph, its data, `genai_config.json`, tokenizer and chat template of a Llama-like model to `folder`.

    `precision` is that of the weights: int4 or fp32. Raises InvalidInputError where the extra [export] is missing, and
    InvalidBundleError where the model builder fails.
    """
    with tempfile.TemporaryDirectory() as temporary:
        checkpoint, built = Path(temporary) / "checkpoint", Path(temporary) / "built"
        with quiet():
            _unpack(gguf, checkpoint)
        command = (
            *(sys.executable, "-m", "onnxruntime_genai.models.builder", "--input", str(checkpoint)),
            *("--output", str(built), "--precision", precision, "--execution_provider", "cpu"),
            *("--cache_dir", str(Path(temporary) / "cache")),
        )
        # A process of its own: it has no other public interface, and prints a line for each layer.
        done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603  our own words
        if done.returncode:
            said = (done.stderr.strip() or "nothing").splitlines()[-1]
            raise InvalidBundleError(f"onnxruntime-genai's model builder failed on {gguf.name}. It said: {said}")
        shutil.copytree(built, folder, dirs_exist_ok=True)
        shutil.copy(checkpoint / "config.json", folder)


def _unpack(gguf: Path, checkpoint: Path) -> None:
    """Write a plain fp32 checkpoint: a model loaded from GGUF says that it is quantized, which the builder refuses."""
    with needs_extra("export"):
        import accelerate  # noqa: F401, PLC0415  what transformers reads a GGUF file with
        import gguf as _  # noqa: F401, PLC0415
        import torch  # noqa: PLC0415
        from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: PLC0415
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = type(model)(config)
    plain.load_state_dict(model.state_dict())
    plain.save_pretrained(checkpoint)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(checkpoint)
