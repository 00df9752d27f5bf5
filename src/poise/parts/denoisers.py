"""Denoisers that are no proximal operators, to compare a learned one with: DnCNN and the gradient step."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from poise.errors import InputError

__all__ = ["DnCNN", "GradientStepDenoiser"]


class DnCNN(nn.Module):
    """A plain convolutional denoiser that predicts the noise: `D(y) = y - N(y)`. Nothing says that it is a proximal operator.

    Args:
        channels: of the image.
        hidden: channels inside.
        depth: 3 x 3 convolutions, at least 2.
        activation: "relu", or "elu" where its gradient is needed (`GradientStepDenoiser`).

    Without batch normalisation, whose statistics would make the map depend on the batch.

    Example:
        >>> DnCNN(1, hidden=8, depth=3)(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 1, 8, 8])

    Source: Zhang et al., arXiv:1608.03981.
    """

    def __init__(self, channels: int = 1, hidden: int = 64, depth: int = 17, activation: str = "relu") -> None:
        super().__init__()
        if min(channels, hidden) < 1 or depth < 2 or activation not in ("relu", "elu"):
            raise InputError(
                f"DnCNN: channels and hidden are at least 1, depth at least 2 and activation 'relu' or 'elu'; got {channels}, {hidden}, "
                f"{depth} and {activation!r}."
            )
        kind = nn.ReLU if activation == "relu" else nn.ELU
        layers: list[nn.Module] = [nn.Conv2d(channels, hidden, 3, padding=1), kind()]
        for _ in range(depth - 2):
            layers += [nn.Conv2d(hidden, hidden, 3, padding=1), kind()]
        self.noise = nn.Sequential(*layers, nn.Conv2d(hidden, channels, 3, padding=1))

    def forward(self, y: Tensor) -> Tensor:
        """Return the denoised image."""
        denoised: Tensor = y - self.noise(y)
        return denoised


class GradientStepDenoiser(nn.Module):
    """One gradient step on a learned function: `D(y) = y - grad g(y)`, `g(y) = 1/2 ||y - N(y)||^2`.

    A potential is known, but D is a proximal operator only where `grad g` has a Lipschitz constant below 1, which training has to ask for.

    Args:
        network: N, a smooth denoiser from image to image; a `DnCNN` with "elu" by default.
        channels: of the image, for the default.

    Example:
        >>> d = GradientStepDenoiser(DnCNN(1, 4, 2, "elu"))
        >>> d.potential(torch.zeros(3, 1, 8, 8)).shape
        torch.Size([3])

    Source: Hurault, Leclaire and Papadakis, arXiv:2110.03220.
    """

    def __init__(self, network: nn.Module | None = None, channels: int = 1) -> None:
        super().__init__()
        self.network = DnCNN(channels, 32, 5, "elu") if network is None else network

    def potential(self, y: Tensor) -> Tensor:
        """Return g(y), float [batch]."""
        away: Tensor = y - self.network(y)
        return 0.5 * away.flatten(1).square().sum(1)

    def forward(self, y: Tensor) -> Tensor:
        """Return the denoised image; the graph is kept where gradients are recorded."""
        keep = torch.is_grad_enabled()
        with torch.enable_grad():
            point = y if keep and y.requires_grad else y.detach().requires_grad_()
            (slope,) = torch.autograd.grad(self.potential(point).sum(), point, create_graph=keep)
        return y - slope
