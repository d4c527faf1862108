import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from harness.small_tokenizers import loaded, wordpiece_json
from modelfleet.tokenizer.encoder import EncodingOptions
from modelfleet.tokenizer.encoding_threads import EncodingThreads
from tokenizers import Encoding, Tokenizer


@dataclass
class Watched:
    """A tokenizer of the library that remembers the threads it ran in."""

    library: Tokenizer
    threads: set[threading.Thread] = field(default_factory=set)

    def encode_batch_fast(self, texts: Sequence[str], **options: Any) -> list[Encoding]:
        self.threads.add(threading.current_thread())
        return self.library.encode_batch_fast(texts, **options)


@pytest.mark.parametrize(
    ("texts", "beside"),
    [(["the cat"], False), (["cat "] * 20, False), (["cat " * 200], True), ([""] * 200, True), (["a"] * 16_384, True)],
    ids=["one", "a few", "long", "many empty ones", "many"],
)
async def test_what_takes_longer_than_a_hop_runs_beside_the_event_loop(texts: list[str], beside: bool) -> None:
    watched = Watched(loaded(wordpiece_json()).library)
    tokenizer = replace(loaded(wordpiece_json()), library=watched)
    threads = EncodingThreads(1)

    tokens = await threads.encode(tokenizer, texts, [], EncodingOptions())

    assert len(tokens.token_counts) == len(texts)
    assert (threading.main_thread() not in watched.threads) is beside
    threads.close()
