"""The adversarial losses by name: what D minimises, and what G does.

Each is made of kinds of :func:`fastgan.gan_loss`:

    name       D                              G
    bce        bce                            bce towards real: non-saturating, -log D(G(z))
    minimax    bce                            minus D's: log(1 - D(G(z)))
    lsgan      lsgan                          lsgan towards real
    hinge      hinge                          wasserstein
    wgan-gp    wasserstein                    wasserstein

Goodfellow et al. 2014 (https://arxiv.org/abs/1406.2661) for the first two, Mao et al. 2016
(https://arxiv.org/abs/1611.04076), Lim & Ye 2017 (https://arxiv.org/abs/1705.02894) and Gulrajani
et al. 2017 (https://arxiv.org/abs/1704.00028).
"""

from __future__ import annotations

from typing import NamedTuple

from fastgan import choices

REAL, FAKE = 1.0, 0.0


class AdversarialLoss(NamedTuple):
    """What the two networks minimise.

    Attributes:
        kind_d: of :func:`fastgan.gan_loss`, towards ``REAL`` and ``FAKE``, for D.
        kind_g: the same, for G.
        target_g: what G has D take its samples for, or not take them for.
        g_maximises: whether G makes that loss as large as it can.
        boundary: the score above which D takes an image for real.
    """

    kind_d: str
    kind_g: str
    target_g: float = REAL
    g_maximises: bool = False
    boundary: float = 0.0


LOSSES: dict[choices.Loss, AdversarialLoss] = {
    "bce": AdversarialLoss("bce", "bce"),
    "minimax": AdversarialLoss("bce", "bce", target_g=FAKE, g_maximises=True),
    "lsgan": AdversarialLoss("lsgan", "lsgan", boundary=0.5),
    "hinge": AdversarialLoss("hinge", "wasserstein"),
    "wgan-gp": AdversarialLoss("wasserstein", "wasserstein"),
}
