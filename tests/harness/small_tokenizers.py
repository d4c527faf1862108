"""Small but whole tokenizers, built in code: of the kind that BERT has and of the kind that RoBERTa has."""

import hashlib
import string
from functools import cache

from modelfleet.tokenizer.tokenizers import LoadedTokenizer, load_tokenizer
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

_WORDS = ("the", "cat", "sat", "on", "mat", "hello", "world", "token", "##ing", "中", "文", "😀")


@cache
def wordpiece_json() -> bytes:
    """Lower-cases, strips accents, and cuts and pads by itself to 8 tokens unless that is reset."""
    letters = [*string.ascii_lowercase, *string.digits, ".", ","]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *letters, *(f"##{letter}" for letter in letters), *_WORDS]
    tokenizer = Tokenizer(models.WordPiece({token: id_ for id_, token in enumerate(vocabulary)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    tokenizer.enable_padding(length=8)
    tokenizer.enable_truncation(8)
    return tokenizer.to_str().encode()


@cache
def byte_bpe_json() -> bytes:
    """Bytes of UTF-8 merged by frequency; all type ids are 0."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the cat sat on the mat, hello world, 中文 😀 café"] * 10, trainer)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 1), ("<s>", 0), add_prefix_space=False)
    return tokenizer.to_str().encode()


@cache
def loaded(content: bytes) -> LoadedTokenizer:
    """Load one of the above."""
    return load_tokenizer(digest_of(content), content)


def digest_of(content: bytes) -> str:
    """Return the SHA-256."""
    return hashlib.sha256(content).hexdigest()
