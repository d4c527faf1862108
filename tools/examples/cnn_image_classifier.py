"""
An image classifier: convolutions over the handwritten digits that scikit-learn carries.

    modelfleet export --module tools.examples.cnn_image_classifier:digits --out .cache/digits
    modelfleet push .cache/digits --name digits --alias stable

It is a `tensor` model: images go in through the Open Inference Protocol, and logits come out.
"""

import numpy as np
import torch
from modelfleet_tools.export.source import Source
from sklearn.datasets import load_digits
from torch import Tensor, nn

EPOCHS = 15
BATCH = 64
GREYS = 16.0


class DigitCnn(nn.Module):
    """From images, float32 [batch, 1, 8, 8] of 0 to 1, to logits, float32 [batch, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(32 * 4 * 4, 10),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Return logits."""
        logits: Tensor = self.layers(images)
        return logits


def digits() -> Source:
    """Train on all but the last 297 of the 1797 images, which are the examples."""
    torch.manual_seed(0)
    found = load_digits()
    images = (found.images[:, None] / GREYS).astype(np.float32)
    inputs, wanted = torch.from_numpy(images[:1500]), torch.from_numpy(found.target[:1500])
    module = DigitCnn()
    optimizer = torch.optim.Adam(module.parameters(), lr=3e-3)
    loss = nn.CrossEntropyLoss()
    for _ in range(EPOCHS):
        for indices in torch.randperm(len(inputs)).split(BATCH):
            optimizer.zero_grad()
            loss(module(inputs[indices]), wanted[indices]).backward()
            optimizer.step()
    return Source(
        module=module.eval(),
        inputs={"images": images[1500:1516]},
        outputs=("logits",),
        manifest={"task": "tensor", "license": "Apache-2.0"},
    )
