"""
A text classifier without transformers: a vocabulary of its own, an embedding, an LSTM, a linear layer.

    modelfleet samples data prompt-injection
    modelfleet export --module tools.examples.lstm_text_classifier:trained --out .cache/lstm \
      --data .cache/data/prompt-injection/test.csv
    modelfleet push .cache/lstm --name lstm --alias stable

It learns from the prompt-injection set, in a minute on two cores.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from modelfleet.bundle.manifest import Manifest
from modelfleet_tools.export.source import Axis, Source
from modelfleet_tools.export.text_rows import DEFAULT_TEXTS, TextRows
from modelfleet_tools.labelled_texts import LabelledTexts, read_labelled
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn

DATA = Path(".cache/data/prompt-injection/train.csv")
MAX_TOKENS = 128
WORDS = 6000
EPOCHS = 4
BATCH = 64
INPUTS = ("input_ids", "attention_mask")


class LstmClassifier(nn.Module):
    """From ids and mask, int64 [batch, sequence], to logits, float32 [batch, labels]."""

    def __init__(self, words: int, labels: int, width: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, width)
        self.lstm = nn.LSTM(width, width, batch_first=True)
        self.output = nn.Linear(width, labels)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return logits."""
        states, _ = self.lstm(self.embedding(input_ids))
        # The mean over real tokens: what padding adds behind them must not change an answer.
        mask = attention_mask.unsqueeze(-1).to(states.dtype)
        return self.output((states * mask).sum(dim=1) / mask.sum(dim=1))


def trained() -> Source:
    """Train on the prompt-injection set."""
    return source_of(read_labelled(str(DATA)), epochs=EPOCHS)


def source_of(data: LabelledTexts, *, epochs: int) -> Source:
    """Train a vocabulary and a classifier."""
    torch.manual_seed(0)
    labels = sorted(set(data.labels))
    tokenizer = _vocabulary(data.texts)
    manifest = {
        "task": "classify",
        "tokenizer": "tokenizer.json",
        "max_tokens": MAX_TOKENS,
        "vocabulary_size": tokenizer.get_vocab_size(),
        "labels": labels,
        "license": "Apache-2.0",
    }
    content = tokenizer.to_str().encode()
    rows = TextRows(content, Manifest.model_validate({"model": "model.onnx", **manifest}), INPUTS)
    module = LstmClassifier(tokenizer.get_vocab_size(), len(labels))
    _train(module, rows, data, labels, epochs)
    axes = {0: Axis("batch", 1, 4096), 1: Axis("sequence", 1, MAX_TOKENS)}
    return Source(
        module=module,
        inputs=rows.batch(DEFAULT_TEXTS),
        outputs=("logits",),
        axes=dict.fromkeys(INPUTS, axes),
        manifest=manifest,
        files={"tokenizer.json": content},
    )


def _vocabulary(texts: Sequence[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))  # noqa: S106  no secret
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordLevelTrainer(vocab_size=WORDS, special_tokens=["[PAD]", "[UNK]"], show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _train(module: nn.Module, rows: TextRows, data: LabelledTexts, labels: Sequence[str], epochs: int) -> None:
    optimizer = torch.optim.Adam(module.parameters(), lr=3e-3)
    loss = nn.CrossEntropyLoss()
    wanted = torch.tensor([labels.index(label) for label in data.labels])
    # Neighbours in length share a batch, which then has little padding.
    order = torch.tensor(sorted(range(len(data)), key=lambda index: len(data.texts[index])))
    batches = order.split(BATCH)
    for _ in range(epochs):
        for batch in torch.randperm(len(batches)).tolist():
            indices = batches[batch]
            inputs = rows.batch([data.texts[index] for index in indices.tolist()])
            optimizer.zero_grad()
            loss(module(*(torch.from_numpy(inputs[name]) for name in INPUTS)), wanted[indices]).backward()
            optimizer.step()
    module.eval()
