"""The head: a linear layer, or a hidden one before it, trained until a validation split gets no better."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Labels = NDArray[np.int64]

_BATCH = 256
_LEARNING_RATE = 3e-3
_WEIGHT_DECAY = 1e-3
_DROPOUT = 0.2
_SEED = 20260101


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """A matrix [outputs, inputs] and a bias [outputs]; ReLU is between two layers."""

    weight: Floats
    bias: Floats


@dataclass(frozen=True, slots=True)
class Head:
    """Layers, and how they came about: epochs run, the best of them, the loss on the validation split there."""

    layers: tuple[Layer, ...]
    epochs: int
    best_epoch: int
    validation_loss: float


@dataclass(frozen=True, slots=True)
class Split:
    """Vectors [texts, dimensions] and the index of each one's label."""

    vectors: Floats
    labels: Labels


def train_head(
    train: Split,
    validation: Split,
    *,
    labels: int,
    hidden: int,
    epochs: int,
    patience: int,
    progress: Callable[[int, float], None],
) -> Head:
    """
    Train by cross-entropy with Adam, rare labels weighing more; the epoch with the least validation loss is kept.

    `hidden` is the size of the hidden layer, 0 for none. It ends `patience` epochs after the best one. `progress` hears
    each epoch and its validation loss.
    """
    import torch  # noqa: PLC0415  torch is needed by exports alone
    from torch import nn  # noqa: PLC0415

    torch.manual_seed(_SEED)
    torch.set_num_threads(1)  # layers this small lose more to the threads' barriers than they gain
    dimensions = train.vectors.shape[1]
    layers = (
        [nn.Linear(dimensions, hidden), nn.ReLU(), nn.Dropout(_DROPOUT), nn.Linear(hidden, labels)]
        if hidden
        else [nn.Linear(dimensions, labels)]
    )
    model = nn.Sequential(*layers)
    counts = np.bincount(train.labels, minlength=labels)
    loss = nn.CrossEntropyLoss(weight=torch.tensor(counts.sum() / (labels * counts), dtype=torch.float32))
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LEARNING_RATE, weight_decay=_WEIGHT_DECAY)
    # Unit vectors have tiny components; the scale is folded into the first layer at the end.
    scale = float(1 / max(train.vectors.std(), np.finfo(np.float32).tiny))
    inputs, targets = torch.from_numpy(train.vectors) * scale, torch.from_numpy(train.labels)
    seen, wanted = torch.from_numpy(validation.vectors) * scale, torch.from_numpy(validation.labels)
    best, best_epoch, best_loss, epoch = copy.deepcopy(model.state_dict()), 0, float("inf"), 0
    for epoch in range(1, epochs + 1):
        model.train()
        for indices in torch.randperm(len(inputs)).split(_BATCH):
            optimizer.zero_grad()
            loss(model(inputs[indices]), targets[indices]).backward()
            optimizer.step()
        model.eval()
        with torch.inference_mode():
            now = float(loss(model(seen), wanted))
        progress(epoch, now)
        if now < best_loss:
            best, best_epoch, best_loss = copy.deepcopy(model.state_dict()), epoch, now
        if epoch - best_epoch >= patience:
            break
    model.load_state_dict(best)
    linear = [layer for layer in model if isinstance(layer, nn.Linear)]
    arrays = [Layer(layer.weight.detach().numpy(), layer.bias.detach().numpy()) for layer in linear]
    arrays[0] = Layer(arrays[0].weight * np.float32(scale), arrays[0].bias)
    return Head(tuple(arrays), epoch, best_epoch, best_loss)


def logits(head: Head, vectors: Floats) -> Floats:
    """Return what the head gives, [texts, labels]."""
    found = vectors
    for index, layer in enumerate(head.layers):
        found = (np.maximum(found, 0) if index else found) @ layer.weight.T + layer.bias
    return found
