"""The adversarial losses in NumPy's float64, from the formulas of their papers.

Without torch, as :mod:`support.cuda_kernel_cases`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

Array = np.ndarray


class Formula(NamedTuple):
    """A loss of one logit and its target, and the derivative; ``d`` is the mean of ``score``.

    ``targets``: three that it takes, as unlike one another as it takes them.
    """

    loss: Callable[[Array, Array], Array]
    gradient: Callable[[Array, Array], Array]
    score: Callable[[Array], Array]
    targets: tuple[float, float, float]


def sigmoid(x: Array) -> Array:
    return np.exp(-np.logaddexp(0, -x))


def _sign(t: Array) -> Array:
    return np.where(t == 1, 1.0, -1.0)


# In the order in which the kernels number them.
FORMULAS = {
    "bce": Formula(
        lambda x, t: t * np.logaddexp(0, -x) + (1 - t) * np.logaddexp(0, x),
        lambda x, t: sigmoid(x) - t,
        sigmoid,
        (0.9, 0.0, 0.3),
    ),
    "lsgan": Formula(
        lambda x, t: (x - t) ** 2 / 2, lambda x, t: x - t, lambda x: x, (0.9, -1.5, 20.0)
    ),
    "hinge": Formula(
        lambda x, t: np.maximum(0, 1 - _sign(t) * x),
        lambda x, t: np.where(_sign(t) * x < 1, -_sign(t), 0.0),
        lambda x: x,
        (1.0, 0.0, 1.0),
    ),
    "wasserstein": Formula(
        lambda x, t: -_sign(t) * x,
        lambda x, t: np.broadcast_to(-_sign(t), x.shape),
        lambda x: x,
        (1.0, 0.0, 1.0),
    ),
}
KINDS = tuple(FORMULAS)


def adversarial(logits: Array, targets: Sequence[float], kind: str) -> dict[str, Array]:
    """``loss`` and ``d``, ``[groups]``, and ``dlogits``, shaped as ``logits``, of each group."""
    of = FORMULAS[kind]
    x = logits.astype(np.float64).reshape(len(targets), -1)
    t = np.array(targets)[:, None]
    return {
        "loss": of.loss(x, t).mean(1),
        "d": of.score(x).mean(1),
        "dlogits": (of.gradient(x, t) / x.shape[1]).reshape(logits.shape),
    }
