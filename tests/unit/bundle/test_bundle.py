import hashlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from modelfleet.bundle.bundle import Bundle, BundleFile, check_path, check_sha256, hash_file
from modelfleet.bundle.manifest import Manifest, Task
from modelfleet.runtime.errors import InvalidBundleError

MANIFEST = Manifest(task=Task.EMBED, model="model.onnx", tokenizer="tokenizer.json", max_tokens=8)
MODEL = BundleFile("model.onnx", "a" * 64, 10)
TOKENIZER = BundleFile("tokenizer.json", "b" * 64, 20)
LICENCE = BundleFile("LICENSE", "c" * 64, 30)
FILES = (MODEL, TOKENIZER, LICENCE)


@given(st.permutations(FILES))
def test_a_digest_does_not_depend_on_the_order_of_files(files: list[BundleFile]) -> None:
    bundle = Bundle(tuple(files), MANIFEST)

    assert bundle.digest == Bundle(FILES, MANIFEST).digest
    assert [file.path for file in bundle.files] == ["LICENSE", "model.onnx", "tokenizer.json"]


def test_a_digest_is_the_same_today_as_ever() -> None:
    # Stored in registries: a change here makes every bundle a new one.
    assert Bundle(FILES, MANIFEST).digest == "5b629dc8e4cf2657412814fbe1b8a4f71025d61199ffa243b2a036e8512932f8"


@pytest.mark.parametrize(
    "other",
    [
        Bundle((MODEL, TOKENIZER), MANIFEST),
        Bundle((MODEL, TOKENIZER, BundleFile("LICENSE", "d" * 64, 30)), MANIFEST),
        Bundle((MODEL, TOKENIZER, BundleFile("LICENCE", "c" * 64, 30)), MANIFEST),
        Bundle(FILES, MANIFEST.model_copy(update={"normalize": True})),
    ],
    ids=["fewer files", "another content", "another name", "another manifest"],
)
def test_a_digest_covers_files_and_manifest(other: Bundle) -> None:
    assert other.digest != Bundle(FILES, MANIFEST).digest


def test_a_bundle_knows_its_tokenizer_and_its_size() -> None:
    assert Bundle(FILES, MANIFEST).tokenizer_digest == "b" * 64
    assert Bundle(FILES, MANIFEST).size == 60
    assert Bundle((MODEL,), Manifest(task=Task.TENSOR, model="model.onnx")).tokenizer_digest is None


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ((TOKENIZER,), "The manifest's model is 'model.onnx', which is not a file of the bundle"),
        ((MODEL,), "The manifest's tokenizer is 'tokenizer.json'"),
        ((), "It has no files"),
        ((*FILES, BundleFile("LICENSE", "d" * 64, 1)), "'LICENSE' twice"),
        ((*FILES, BundleFile("../x", "d" * 64, 1)), "'../x' cannot be a file of a bundle"),
        ((*FILES, BundleFile("x", "D" * 64, 1)), "is no SHA-256"),
        ((*FILES, BundleFile("x", "d" * 64, -1)), "'x' has the size -1"),
    ],
)
def test_files_that_do_not_fit_together_are_refused(files: tuple[BundleFile, ...], message: str) -> None:
    with pytest.raises(InvalidBundleError, match=message):
        Bundle(files, MANIFEST)


parts = st.text(st.characters(exclude_categories=["C"], exclude_characters="/\\"), min_size=1).filter(
    lambda part: part not in (".", "..")
)


@given(st.lists(parts, min_size=1, max_size=4).map("/".join))
def test_a_path_that_is_taken_stays_inside(path: str) -> None:
    check_path(path)

    root = Path("/bundle")
    assert root in (root / path).resolve().parents


@pytest.mark.parametrize(
    "path",
    [
        *("", ".", "..", "../x", "a/../x", "a/..", "./a", "a/./b", "/etc/passwd", "//x", "a//b", "a/"),
        *("a\\b", "..\\x", "C:\\x", "a\0b", "a\nb", "\x1fa", "a\x7fb", "a\x85b", "a\udcffb"),
    ],
)
def test_a_path_that_could_lead_elsewhere_is_refused(path: str) -> None:
    with pytest.raises(InvalidBundleError, match="cannot be a file of a bundle") as raised:
        check_path(path)
    assert raised.value.field == "files"


@pytest.mark.parametrize("digest", ["", "a" * 63, "a" * 65, "A" * 64, "g" * 64, "a" * 64 + "\n", "../" + "a" * 61])
def test_what_is_no_sha256_is_refused(digest: str) -> None:
    with pytest.raises(InvalidBundleError, match="is no SHA-256"):
        check_sha256(digest)


@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, 1 << 20, (1 << 20) + 1])
def test_a_file_is_hashed_whole(tmp_path: Path, size: int) -> None:
    content = bytes(index % 251 for index in range(size))
    path = tmp_path / "file"
    path.write_bytes(content)

    assert hash_file(path) == (hashlib.sha256(content).hexdigest(), size)
