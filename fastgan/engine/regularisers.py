"""What steadies a GAN besides its loss: gradient penalties, and changes to the images D sees.

Penalties are of the gradient of D's scores with respect to its input, and are differentiated once
more. All of it is plain torch on the device, and can be captured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgan.errors import InputError

# Zhao et al. 2020, appendix: shifts of up to an eighth of the side, a square of half of it.
_SHIFT, _CUTOUT = 1 / 8, 1 / 2


def gradient_penalty(
    score: Callable[[Tensor], Tensor], real: Tensor, fake: Tensor, generator: torch.Generator
) -> Tensor:
    """``mean((|grad D(x)| - 1)^2)`` at points ``x`` drawn between real and generated samples.

    Gulrajani et al. 2017, https://arxiv.org/abs/1704.00028, equation 3, without its weight.

    Args:
        score: D, from ``[N, ...]`` to scores ``[N, ...]``, differentiable twice.
        real, fake: ``[N, ...]``.
        generator: of the points, on their device.
    """
    weight = torch.rand(
        len(real), *[1] * (real.ndim - 1), generator=generator, device=real.device
    ).to(real.dtype)
    x = (real + weight * (fake - real)).detach().requires_grad_()
    return (_input_gradient(score(x), x).norm(dim=1) - 1.0).square().mean()


def r1_penalty(scores: Tensor, real: Tensor) -> Tensor:
    """``mean(|grad D(x)|^2) / 2`` over real images.

    Mescheder et al. 2018, https://arxiv.org/abs/1801.04406, equation 9, without its weight.

    Args:
        scores: D's, ``[N, ...]``, differentiable twice.
        real: what they were made from, ``[N, ...]``, which requires a gradient.
    """
    return _input_gradient(scores, real).square().sum(dim=1).mean() / 2.0


def _input_gradient(scores: Tensor, x: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad(scores.sum(), x, create_graph=True)
    return gradient.flatten(1)


def add_noise(x: Tensor, deviation: Tensor, generator: torch.Generator) -> Tensor:
    """``x`` with normal noise of the standard deviation ``deviation`` (0-d).

    Instance noise: Sønderby et al. 2016, https://arxiv.org/abs/1610.04490.
    """
    noise = torch.randn(x.shape, generator=generator, device=x.device, dtype=torch.float32)
    return x + (noise * deviation).to(x.dtype)


class DiffAugment:
    """Random changes of images through which gradients pass, the same for real and generated.

    Zhao et al. 2020, https://arxiv.org/abs/2006.10738, with the strengths given there.

    Args:
        policy: of ``color`` (brightness, saturation, contrast), ``translation`` (by up to an eighth
            of the side, zeros shifted in) and ``cutout`` (a square of half the side, zeroed); they
            are done in the order given.

    Raises:
        InputError: one of another name.
    """

    def __init__(self, policy: Sequence[str]) -> None:
        unknown = [name for name in policy if name not in DIFF_AUGMENTS]
        if unknown:
            raise InputError(
                f"diff_augment={unknown[0]!r} is unknown; choose from {', '.join(DIFF_AUGMENTS)}"
            )
        self.policy = tuple(policy)

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """``x [N, C, H, W]`` in [-1, 1], each image changed in its own way."""
        for name in self.policy:
            x = DIFF_AUGMENTS[name](x, generator)
        return x


def _uniform(x: Tensor, generator: torch.Generator) -> Tensor:
    """``[N, 1, 1, 1]`` in [0, 1)."""
    draw = torch.rand(len(x), 1, 1, 1, generator=generator, device=x.device)
    return draw.to(x.dtype)


def _color(x: Tensor, generator: torch.Generator) -> Tensor:
    x = x + (_uniform(x, generator) - 0.5)
    mean = x.mean(dim=1, keepdim=True)
    x = (x - mean) * (_uniform(x, generator) * 2.0) + mean
    mean = x.mean(dim=(1, 2, 3), keepdim=True)
    return (x - mean) * (_uniform(x, generator) + 0.5) + mean


def _integers(x: Tensor, low: int, high: int, generator: torch.Generator) -> Tensor:
    """``[N]`` from ``low`` to ``high``, both included."""
    return torch.randint(low, high + 1, (len(x),), generator=generator, device=x.device)


def _translation(x: Tensor, generator: torch.Generator) -> Tensor:
    n, _, h, w = x.shape
    down, across = (int(side * _SHIFT + 0.5) for side in (h, w))
    # One row and column of zeros around it, to which all that is outside is clamped.
    padded = F.pad(x, (1, 1, 1, 1)).permute(0, 2, 3, 1)
    rows = torch.arange(h, device=x.device) + _integers(x, -down, down, generator)[:, None] + 1
    columns = (
        torch.arange(w, device=x.device) + _integers(x, -across, across, generator)[:, None] + 1
    )
    image = torch.arange(n, device=x.device)[:, None, None]
    rows, columns = rows.clamp(0, h + 1), columns.clamp(0, w + 1)
    return padded[image, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def _cutout(x: Tensor, generator: torch.Generator) -> Tensor:
    h, w = x.shape[2:]
    kept = []
    for side in (h, w):
        size = int(side * _CUTOUT + 0.5)
        # Its centre lies anywhere in the image, so that part of it may be outside.
        first = _integers(x, 0, side - size % 2, generator) - size // 2
        at = torch.arange(side, device=x.device)
        kept.append((at < first[:, None]) | (at >= first[:, None] + size))
    rows, columns = kept
    return x * (rows[:, None, :, None] | columns[:, None, None, :]).to(x.dtype)


DIFF_AUGMENTS: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "color": _color,
    "translation": _translation,
    "cutout": _cutout,
}
