import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from harness.blob_manager import BlobManager
from harness.serving import serving
from harness.small_tokenizers import byte_bpe_json, digest_of, wordpiece_json
from harness.tokenizer import running_tokenizer
from modelfleet.api.manager.v1.model_service_pb2_grpc import add_ModelServiceServicer_to_server
from modelfleet.api.tokenizer.v1 import tokenizer_pb2 as pb
from modelfleet.api.tokenizer.v1.tokenizer_pb2_grpc import TokenizerServiceStub
from modelfleet.client.errors import from_rpc_error
from modelfleet.runtime import errors

WORDPIECE = digest_of(wordpiece_json())
BYTE_BPE = digest_of(byte_bpe_json())
NO_TOKENIZER = digest_of(b"not a tokenizer")
DAMAGED = digest_of(b"what it should be")
ABSENT = "0" * 64


@pytest.fixture
def manager() -> BlobManager:
    blobs = {
        WORDPIECE: wordpiece_json(),
        BYTE_BPE: byte_bpe_json(),
        NO_TOKENIZER: b"not a tokenizer",
        DAMAGED: b"what it is",
    }
    return BlobManager(blobs, models={"minilm": WORDPIECE, "vision": ""})


@pytest.fixture
async def tokenizer(manager: BlobManager, tmp_path: Path) -> AsyncIterator[TokenizerServiceStub]:
    async with (
        serving(lambda server: add_ModelServiceServicer_to_server(manager, server)) as address,
        running_tokenizer(address, tmp_path, max_texts=10_000, max_text_bytes=1 << 20) as stub,
    ):
        yield stub


def ints(packed: bytes) -> list[int]:
    return np.frombuffer(packed, "<i4").tolist()


def packed(*values: int) -> bytes:
    return np.array(values, "<i4").tobytes()


async def assert_refused(
    call: grpc.aio.UnaryUnaryCall, kind: type[errors.ModelfleetError], code: grpc.StatusCode, message: str, field: str
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call
    error = from_rpc_error(raised.value)
    assert type(error) is kind
    assert raised.value.code() is code
    assert message in error.message
    assert (error.field or "") == field


async def assert_still_serves(tokenizer: TokenizerServiceStub) -> None:
    response = await tokenizer.Tokenize(pb.TokenizeRequest(tokenizer_digest=WORDPIECE, texts=["the cat"]))
    assert ints(response.token_counts) == [4]


async def test_tokenize_packs_the_windows_of_all_texts(tokenizer: TokenizerServiceStub) -> None:
    response = await tokenizer.Tokenize(
        pb.TokenizeRequest(
            tokenizer_digest=WORDPIECE,
            texts=["cat", "the cat sat on"],
            max_tokens=5,
            windowing=pb.Windowing(stride=1),
            with_offsets=True,
        )
    )

    the, cat, sat, on = 80, 81, 82, 83
    assert ints(response.ids) == [2, cat, 3, 2, the, cat, sat, 3, 2, sat, on, 3]
    assert ints(response.lengths) == [3, 5, 4]
    assert ints(response.window_counts) == [1, 2]
    assert ints(response.token_counts) == [3, 6]
    assert np.array(ints(response.offsets)).reshape(-1, 2).tolist() == [
        [0, 0], [0, 3], [0, 0],
        [0, 0], [0, 3], [4, 7], [8, 11], [0, 0],
        [0, 0], [8, 11], [12, 14], [0, 0],
    ]  # fmt: skip
    assert response.type_ids == b""


async def test_tokenize_pairs(tokenizer: TokenizerServiceStub) -> None:
    response = await tokenizer.Tokenize(
        pb.TokenizeRequest(tokenizer_digest=WORDPIECE, texts=["the cat", "on"], pairs=["sat", "the mat"])
    )

    assert ints(response.lengths) == [6, 6]
    assert response.type_ids == bytes([0, 0, 0, 0, 1, 1, 0, 0, 0, 1, 1, 1])
    assert response.offsets == response.window_counts == b""


@pytest.mark.parametrize(
    ("truncation", "kept"),
    [
        (pb.TRUNCATION_UNSPECIFIED, "the cat"),
        (pb.TRUNCATION_RIGHT, "the cat"),
        (pb.TRUNCATION_LEFT, "sat on"),
    ],
)
async def test_truncation_cuts_the_side_that_is_asked_for(
    tokenizer: TokenizerServiceStub, truncation: pb.Truncation, kept: str
) -> None:
    response = await tokenizer.Tokenize(
        pb.TokenizeRequest(tokenizer_digest=WORDPIECE, texts=["the cat sat on"], max_tokens=4, truncation=truncation)
    )

    back = await tokenizer.Detokenize(
        pb.DetokenizeRequest(tokenizer_digest=WORDPIECE, ids=response.ids, lengths=response.lengths)
    )
    assert list(back.texts) == [kept]
    assert ints(response.token_counts) == [6]


async def test_special_tokens_are_left_out_when_asked_for(tokenizer: TokenizerServiceStub) -> None:
    response = await tokenizer.Tokenize(
        pb.TokenizeRequest(tokenizer_digest=WORDPIECE, texts=["the cat"], no_special_tokens=True)
    )

    assert ints(response.ids) == [80, 81]


async def test_windows_of_many_texts_that_repeat_them_too_often_are_refused(tokenizer: TokenizerServiceStub) -> None:
    texts = ["cat " * 1000] * 80  # 2 million tokens in windows; 420,000 in a piece of the work
    request = pb.TokenizeRequest(
        tokenizer_digest=WORDPIECE, texts=texts, max_tokens=512, windowing=pb.Windowing(stride=500)
    )

    await assert_refused(
        *(tokenizer.Tokenize(request), errors.InvalidInputError, grpc.StatusCode.INVALID_ARGUMENT),
        *("windowing.stride is 500", "windowing.stride"),
    )
    await assert_still_serves(tokenizer)


async def test_a_chat_has_as_many_messages_as_a_request_may_have_texts(tokenizer: TokenizerServiceStub) -> None:
    messages = [pb.ChatMessage(role="user", content="a")] * 10_001

    await assert_refused(
        tokenizer.RenderChat(pb.RenderChatRequest(template_digest=WORDPIECE, messages=messages)),
        *(errors.InvalidInputError, grpc.StatusCode.INVALID_ARGUMENT),
        *("messages has 10001, but one request may have 10000", "messages"),
    )
    await assert_still_serves(tokenizer)


async def test_many_texts_and_a_large_one_come_back_in_order(tokenizer: TokenizerServiceStub) -> None:
    texts = [f"{'cat ' * (index % 50)}" for index in range(10_000)]
    texts[5000] = "the mat " * 20_000

    response = await tokenizer.Tokenize(
        pb.TokenizeRequest(tokenizer_digest=WORDPIECE, texts=texts, max_tokens=128, windowing=pb.Windowing(stride=16))
    )

    counts = [index % 50 + 2 for index in range(10_000)]
    counts[5000] = 40_002
    assert ints(response.token_counts) == counts
    windows = ints(response.window_counts)
    assert windows[5000] == -(-(40_000 - 126) // (126 - 16)) + 1
    assert sum(windows) == len(windows) - 1 + windows[5000] == len(ints(response.lengths))
    assert len(ints(response.ids)) == sum(ints(response.lengths))


async def test_pieces_of_a_request_agree_on_type_ids_and_windows(tokenizer: TokenizerServiceStub) -> None:
    long = "cat " * 30_000  # more than a piece
    request = pb.TokenizeRequest(
        tokenizer_digest=WORDPIECE, texts=["the", long, "the"], pairs=["mat", "", "mat"], max_tokens=10
    )

    response = await tokenizer.Tokenize(request)

    assert ints(response.lengths) == [5, 10, 5]
    assert response.type_ids == bytes([0, 0, 0, 1, 1]) + bytes(9) + b"\x01" + bytes([0, 0, 0, 1, 1])
    assert response.window_counts == b""


async def test_a_small_request_does_not_wait_for_large_ones(tokenizer: TokenizerServiceStub) -> None:
    await assert_still_serves(tokenizer)
    large = pb.TokenizeRequest(tokenizer_digest=WORDPIECE, texts=["the cat sat on " * 200] * 300)
    finished: list[str] = []

    async def call(name: str, request: pb.TokenizeRequest) -> None:
        await tokenizer.Tokenize(request)
        finished.append(name)

    larges = [asyncio.create_task(call("large", large)) for _ in range(3)]
    await call("medium", pb.TokenizeRequest(tokenizer_digest=WORDPIECE, texts=["the cat sat on " * 100]))
    await asyncio.gather(*larges)

    assert finished[0] == "medium"


async def test_detokenize_returns_a_text_for_each_sequence(tokenizer: TokenizerServiceStub) -> None:
    request = pb.DetokenizeRequest(tokenizer_digest=WORDPIECE, ids=packed(2, 80, 81, 3, 2, 82, 3), lengths=packed(4, 3))

    plain = await tokenizer.Detokenize(request)
    request.keep_special_tokens = True
    special = await tokenizer.Detokenize(request)

    assert list(plain.texts) == ["the cat", "sat"]
    assert list(special.texts) == ["[CLS] the cat [SEP]", "[CLS] sat [SEP]"]


async def test_get_tokenizer_by_digest_and_by_model_are_alike(tokenizer: TokenizerServiceStub) -> None:
    by_digest = await tokenizer.GetTokenizer(pb.GetTokenizerRequest(tokenizer_digest=WORDPIECE))
    by_model = await tokenizer.GetTokenizer(pb.GetTokenizerRequest(model="minilm@stable"))

    assert by_digest == by_model
    assert by_digest.tokenizer.digest == WORDPIECE
    assert by_digest.tokenizer.added_to_pair == 3
    assert [token.content for token in by_digest.tokenizer.special_tokens] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]


async def test_the_request_id_travels_on_to_the_manager(tokenizer: TokenizerServiceStub, manager: BlobManager) -> None:
    await tokenizer.Tokenize(
        pb.TokenizeRequest(tokenizer_digest=WORDPIECE, texts=["cat"]), metadata=(("x-request-id", "from-the-test"),)
    )

    assert manager.request_ids == ["from-the-test"]


INVALID = (errors.InvalidInputError, grpc.StatusCode.INVALID_ARGUMENT)
NOT_A_BUNDLE = (errors.InvalidBundleError, grpc.StatusCode.INVALID_ARGUMENT)
NOT_FOUND = (errors.TokenizerNotFoundError, grpc.StatusCode.NOT_FOUND)


@pytest.mark.parametrize(
    ("request_", "refused", "message", "field"),
    [
        pytest.param(pb.TokenizeRequest(), INVALID, "texts is empty. Give at least one.", "texts", id="no texts"),
        pytest.param(pb.TokenizeRequest(texts=["a"]), INVALID, "'' is no SHA-256", "tokenizer_digest", id="no digest"),
        pytest.param(
            pb.TokenizeRequest(tokenizer_digest=ABSENT, texts=["a"]),
            NOT_FOUND,
            f"no tokenizer with the digest {ABSENT}",
            "tokenizer_digest",
            id="unknown digest",
        ),
        pytest.param(
            pb.TokenizeRequest(tokenizer_digest=NO_TOKENIZER, texts=["a"]),
            NOT_A_BUNDLE,
            "is no tokenizer.json that can be used: ",
            "tokenizer_digest",
            id="no tokenizer.json",
        ),
        pytest.param(
            pb.TokenizeRequest(tokenizer_digest=DAMAGED, texts=["a"]),
            (errors.DigestMismatchError, grpc.StatusCode.DATA_LOSS),
            digest_of(b"what it is"),
            "",
            id="wrong hash",
        ),
        pytest.param(
            pb.TokenizeRequest(tokenizer_digest=WORDPIECE, texts=["a", "b"], pairs=["c"]),
            INVALID,
            "There are 2 texts but 1 pairs.",
            "pairs",
            id="pairs do not match",
        ),
        pytest.param(
            pb.TokenizeRequest(tokenizer_digest=WORDPIECE, texts=["a"] * 10_001),
            INVALID,
            "texts has 10001, but one request may have 10000",
            "texts",
            id="too many texts",
        ),
        pytest.param(
            pb.TokenizeRequest(tokenizer_digest=WORDPIECE, texts=["a", "中" * 400_000]),
            INVALID,
            "texts[1] has 1200000 bytes, but a text may have 1048576",
            "texts[1]",
            id="text too large",
        ),
        pytest.param(
            pb.TokenizeRequest(tokenizer_digest=WORDPIECE, texts=["a"], pairs=["b" * 2_000_000]),
            INVALID,
            "pairs[0] has 2000000 bytes",
            "pairs[0]",
            id="pair too large",
        ),
        pytest.param(
            pb.TokenizeRequest(tokenizer_digest=WORDPIECE, texts=["a"], max_tokens=2),
            INVALID,
            "Use at least 3",
            "max_tokens",
            id="no room",
        ),
        pytest.param(
            pb.TokenizeRequest(tokenizer_digest=WORDPIECE, texts=["a"], max_tokens=8, windowing=pb.Windowing(stride=6)),
            INVALID,
            "Use at most 5",
            "windowing.stride",
            id="stride too large",
        ),
        pytest.param(
            pb.TokenizeRequest(
                tokenizer_digest=WORDPIECE,
                texts=["a", "cat " * 40_000, "the cat sat"],
                max_tokens=40_003,
                truncation=pb.TRUNCATION_FORBIDDEN,
                pairs=["", "", "mat " * 40_000],
            ),
            INVALID,
            "texts[2] with pairs[2] has 40006 tokens, more than the 40003 allowed",
            "pairs[2]",
            id="forbidden truncation in a later piece",
        ),
        pytest.param(
            pb.TokenizeRequest(tokenizer_digest=WORDPIECE, texts=["a"], truncation=9),
            INVALID,
            "truncation is 9",
            "truncation",
            id="unknown truncation",
        ),
    ],
)
async def test_bad_requests_to_tokenize(
    tokenizer: TokenizerServiceStub,
    request_: pb.TokenizeRequest,
    refused: tuple[type[errors.ModelfleetError], grpc.StatusCode],
    message: str,
    field: str,
) -> None:
    await assert_refused(tokenizer.Tokenize(request_), *refused, message, field)
    await assert_still_serves(tokenizer)


@pytest.mark.parametrize(
    ("ids", "lengths", "message", "field"),
    [
        pytest.param(packed(4), b"", "lengths is empty", "lengths", id="no sequences"),
        pytest.param(b"\x04\x00\x00", packed(1), "ids has 3 bytes, not a multiple of 4", "ids", id="half an id"),
        pytest.param(packed(4), b"\x01", "lengths has 1 bytes", "lengths", id="half a length"),
        pytest.param(packed(4, 5), packed(3), "add up to 3, but there are 2", "lengths", id="lengths do not add up"),
        pytest.param(packed(4, 5), packed(3, -1), "lengths has -1", "lengths", id="negative length"),
        pytest.param(packed(4, 9999), packed(2), "Token id 9999 at position 1 is outside the", "ids", id="unknown id"),
        pytest.param(packed(-4), packed(1), "Token id -4 at position 0", "ids", id="negative id"),
    ],
)
async def test_bad_requests_to_detokenize(
    tokenizer: TokenizerServiceStub, ids: bytes, lengths: bytes, message: str, field: str
) -> None:
    request = pb.DetokenizeRequest(tokenizer_digest=WORDPIECE, ids=ids, lengths=lengths)

    await assert_refused(tokenizer.Detokenize(request), *INVALID, message, field)
    await assert_still_serves(tokenizer)


@pytest.mark.parametrize(
    ("request_", "refused", "message", "field"),
    [
        pytest.param(
            pb.GetTokenizerRequest(), INVALID, "Nothing names the tokenizer", "tokenizer_digest", id="nothing"
        ),
        pytest.param(pb.GetTokenizerRequest(model="No!"), INVALID, "'No!' cannot name a model", "model", id="bad name"),
        pytest.param(
            pb.GetTokenizerRequest(model="unknown"),
            (errors.ModelNotFoundError, grpc.StatusCode.NOT_FOUND),
            "No model is named 'unknown'.",
            "model",
            id="unknown model",
        ),
        pytest.param(
            pb.GetTokenizerRequest(model="vision"), NOT_FOUND, "vision@1 has no tokenizer", "model", id="tensor model"
        ),
    ],
)
async def test_bad_requests_to_get_tokenizer(
    tokenizer: TokenizerServiceStub,
    request_: pb.GetTokenizerRequest,
    refused: tuple[type[errors.ModelfleetError], grpc.StatusCode],
    message: str,
    field: str,
) -> None:
    await assert_refused(tokenizer.GetTokenizer(request_), *refused, message, field)
    await assert_still_serves(tokenizer)


async def test_a_blob_too_large_for_a_tokenizer_is_not_loaded(manager: BlobManager, tmp_path: Path) -> None:
    async with (
        serving(lambda server: add_ModelServiceServicer_to_server(manager, server)) as address,
        running_tokenizer(address, tmp_path, max_tokenizer_bytes=len(byte_bpe_json()) - 1) as tokenizer,
    ):
        request = pb.TokenizeRequest(tokenizer_digest=BYTE_BPE, texts=["a"])
        await assert_refused(tokenizer.Tokenize(request), *NOT_A_BUNDLE, "max_tokenizer_bytes", "tokenizer_digest")
        await assert_still_serves(tokenizer)


async def test_concurrent_first_requests_download_once(tokenizer: TokenizerServiceStub, manager: BlobManager) -> None:
    await asyncio.gather(*[assert_still_serves(tokenizer) for _ in range(20)])

    assert manager.downloads == [WORDPIECE]
