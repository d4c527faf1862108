"""Exports of models that write text, tiny and of random weights, by onnxruntime-genai's real builder."""

import json
from pathlib import Path

import pytest
from harness.small_tokenizers import wordpiece_json
from modelfleet.bundle.directory import open_directory
from modelfleet.runtime.errors import InvalidBundleError, InvalidInputError, NotFoundError
from modelfleet_tools.export.widths import Width

pytest.importorskip("torch", reason="torch is not installed: `make test-export` installs it and runs these tests")

import torch
import transformers
from modelfleet_tools.export.compression import Compression
from modelfleet_tools.export.exporting import export, verify
from modelfleet_tools.export.origin import Origin
from modelfleet_tools.export.quiet import quiet

pytestmark = [pytest.mark.slow, pytest.mark.export, pytest.mark.filterwarnings("ignore")]

LLAMA = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "bos_token_id": 2,
    "eos_token_id": 3,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
GPT2 = {"vocab_size": 100, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}


def checkpoint(folder: Path, *, gpt2: bool = False, seed: int = 0) -> Origin:
    """Save a model as transformers would."""
    with quiet():
        torch.manual_seed(seed)
        kind, values = ("gpt2", GPT2) if gpt2 else ("llama", LLAMA)
        config = transformers.AutoConfig.for_model(kind, **values, initializer_range=0.5)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes(wordpiece_json())
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "[SEP]", "pad_token": "[PAD]"})
    )
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Tiny\n")
    return Origin(folder=str(folder))


def test_a_decoder_becomes_a_bundle_whose_next_tokens_are_its_source_s(tmp_path: Path) -> None:
    report = export(checkpoint(tmp_path / "source"), tmp_path / "bundle")

    bundle, paths = open_directory(tmp_path / "bundle")
    assert (bundle.manifest.task, bundle.manifest.license, bundle.manifest.max_tokens) == ("generate", "mit", 64)
    assert {"genai_config.json", "model.onnx", "tokenizer.json", "README.md", "export.json"} <= paths.keys()
    assert report.parity
    assert report.parity.worst < 1e-3
    assert [step.name for step in report.steps] == ["source", "fp32"]
    assert all(step.per_s for step in report.steps)
    parity, drift = verify(tmp_path / "bundle")
    assert parity.shapes == 7  # lengths 1 to 32 of 64
    assert drift < 1e-3
    with pytest.raises(InvalidBundleError, match="differs from its source by"):
        verify(tmp_path / "bundle", checkpoint(tmp_path / "other", seed=1))


def test_narrow_weights_drift_and_are_refused_past_the_limit(tmp_path: Path) -> None:
    origin = checkpoint(tmp_path / "source")

    report = export(origin, tmp_path / "int8", Compression(Width.INT8))

    drift = report.steps[1].drift
    assert drift
    assert 0 < drift < 0.06
    assert verify(tmp_path / "int8")[1] == pytest.approx(drift)
    with pytest.raises(InvalidBundleError, match=r"int8 graph drift by .*; 1e-09 is allowed"):
        export(origin, tmp_path / "bundle", Compression(Width.INT8, max_drift=1e-9))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["int8", "source"]


def test_what_is_built_for_a_gpu_is_not_measured_without_one(tmp_path: Path) -> None:
    report = export(checkpoint(tmp_path / "source"), tmp_path / "bundle", Compression(Width.FP16, device="cuda"))

    assert (report.parity, report.steps[1].drift, report.steps[1].per_s) == (None, None, None)
    settings = json.loads((tmp_path / "bundle/genai_config.json").read_text())
    assert "cuda" in settings["model"]["decoder"]["session_options"]["provider_options"][0]
    with pytest.raises(InvalidInputError, match="runs on cuda, which is not there"):
        verify(tmp_path / "bundle")


@pytest.mark.parametrize(
    ("compression", "message"),
    [
        (Compression(Width.FP16), "on cpu has the --precision fp32 or int8 or int4, not fp16"),
        (Compression(Width.FP32, device="cuda"), "on cuda has the --precision fp16 or int4, not fp32"),
        (Compression(prune=0.5), "takes neither --data nor --prune nor --optimize"),
    ],
)
def test_what_decoders_have_not_is_refused(compression: Compression, message: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match=message):
        export(checkpoint(tmp_path / "source"), tmp_path / "bundle", compression)


def test_sources_that_cannot_be_built_are_named(tmp_path: Path) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"no GGUF")
    (tmp_path / "whole").mkdir()
    (tmp_path / "whole/config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')

    with pytest.raises(
        InvalidBundleError, match=r"failed on gpt2\. .* not currently supported\. Can be built: .*llama"
    ):
        export(checkpoint(tmp_path / "gpt2", gpt2=True), tmp_path / "bundle")
    with pytest.raises(InvalidBundleError, match=r"cannot be read as GGUF: .* Fetch it again"):
        export(Origin(folder=str(tmp_path / "broken.gguf")), tmp_path / "bundle")
    with pytest.raises(NotFoundError, match=r"absent\.gguf is no file"):
        export(Origin(folder=str(tmp_path / "absent.gguf")), tmp_path / "bundle")
    with pytest.raises(InvalidBundleError, match="failed on whole"):
        export(Origin(folder=str(tmp_path / "whole")), tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()
