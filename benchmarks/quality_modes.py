"""Whether a vanilla GAN reaches every mode of a mixture of Gaussians, and a collapse is noticed.

``python -m fastgan.benchmarks.quality_modes``, or with ``--seeds 1 --steps 500`` to see that it
works. Two parts:

- Modes: a ring of 8 and a grid of 25 Gaussians (Srivastava et al. 2017,
  https://arxiv.org/abs/1705.07761; sizes as in Lin et al. 2018, https://arxiv.org/abs/1712.04086).
  Of 2,500 samples those within three deviations of a mode are good, and a mode with a good one is
  reached.
- Health: how many of the runs of a healthy configuration, and of one made to collapse (a D that
  learns a tenth as fast as G and has no penalty), are called ``collapsing`` within 500 steps.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from fastgan.benchmarks import machine, report
from torch import Tensor

from fastgan import Engine
from fastgan.metrics.health import Health, Vitals
from fastgan.nn.mlp import MLPDiscriminator, MLPGenerator
from fastgan.seeding import generator

SAMPLES = 2500
BATCH = 100
_NZ, _HIDDEN = 16, (128, 128)
_WITHIN = 3.0
_HEALTH_STEPS = 500
_READ_EVERY = 100


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Equal normal distributions in the plane.

    Attributes:
        name: of the arrangement.
        centres: ``[modes, 2]``.
        deviation: of each, in both directions.
    """

    name: str
    centres: Tensor
    deviation: float

    def draw(self, n: int, draw: torch.Generator) -> Tensor:
        """Points ``[n, 2]``."""
        mode = torch.randint(len(self.centres), (n,), generator=draw)
        return self.centres[mode] + self.deviation * torch.randn(n, 2, generator=draw)

    def reached(self, points: Tensor) -> tuple[int, float]:
        """How many modes ``points [n, 2]`` reach, and the share of good ones."""
        distances, mode = torch.cdist(points, self.centres).min(dim=1)
        good = distances < _WITHIN * self.deviation
        return len(mode[good].unique()), good.float().mean().item()


def ring() -> Mixture:
    """Eight on the unit circle, of deviation 0.01."""
    angle = torch.arange(8) * (2.0 * math.pi / 8)
    return Mixture("ring of 8", torch.stack([angle.cos(), angle.sin()], dim=1), 0.01)


def grid() -> Mixture:
    """Five by five, two apart, of deviation 0.05; all of it divided by 4, to be of order 1."""
    side = torch.arange(-2.0, 3.0) / 2.0
    return Mixture("grid of 25", torch.cartesian_prod(side, side), 0.05 / 4.0)


class Points:
    """Batches of a mixture, for ``Engine.attach``."""

    def __init__(self, mixture: Mixture, seed: int) -> None:
        self._mixture, self._seed, self._batch = mixture, seed, 0

    def next_batch(self) -> tuple[Tensor, None]:
        """The next 100 points."""
        self._batch += 1
        return self._mixture.draw(BATCH, generator(self._seed, "points", self._batch)), None

    def state_dict(self) -> dict[str, Any]:
        """The position."""
        return {"batch": self._batch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a position."""
        self._batch = state["batch"]


def make_engine(mixture: Mixture, seed: int, **settings: Any) -> Engine:
    """A vanilla GAN of ``mixture``: two hidden layers of 128 in either network."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        netG = MLPGenerator(_NZ, _HIDDEN, (2,), batch_norm=False)
        netD = MLPDiscriminator((2,), _HIDDEN)
    engine = Engine(netG, netD, device="cpu", seed=seed, monitor=Vitals(), **settings)
    engine.attach(Points(mixture, seed))
    return engine


HEALTHY: dict[str, Any] = {"lr": 1e-3, "r1": 0.1, "r1_every": 1, "ema": 0.999}
COLLAPSING: dict[str, Any] = {"lr": 1e-3, "lr_d": 1e-4}


def modes(mixture: Mixture, seeds: int, steps: int) -> dict[str, Any]:
    """Modes reached and share of good samples, over seeds."""
    reached, good, started = [], [], time.perf_counter()
    for seed in range(seeds):
        engine = make_engine(mixture, seed, **HEALTHY)
        for _ in range(steps):
            engine.step()
        found = mixture.reached(engine.sample(SAMPLES))
        reached.append(found[0])
        good.append(found[1])
    return {
        "mixture": mixture.name,
        "modes": len(mixture.centres),
        "reached": f"{statistics.mean(reached):.1f} ({min(reached)} to {max(reached)})",
        "good samples": f"{statistics.mean(good):.1%} ({min(good):.1%} to {max(good):.1%})",
        "seconds a seed": f"{(time.perf_counter() - started) / seeds:.0f}",
    }


def called_collapsing(mixture: Mixture, seed: int, settings: dict[str, Any]) -> int | None:
    """The step at which a run is called ``collapsing``, None if it is not, within 500."""
    engine, health = make_engine(mixture, seed, **settings), Health()
    for step in range(1, _HEALTH_STEPS + 1):
        engine.step()
        if step % _READ_EVERY == 0:
            rows = engine.history.last(_READ_EVERY)
            for i, row in enumerate(rows, step - _READ_EVERY + 1):
                health.add(i, row)
            if health.verdict().state == "collapsing":
                return step
    return None


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--seeds", type=int, default=5, help="of the modes")
    parser.add_argument("--health-seeds", type=int, default=10, help="of the verdicts")
    parser.add_argument("--steps", type=int, default=30_000)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)  # a layer of 128 is not worth two
    cpu = torch.device("cpu")
    record = {"machine": machine.describe(cpu), "measured": machine.measure(cpu)}
    print("\n".join(report.machine_lines(record)), flush=True)
    rows = [modes(mixture, args.seeds, args.steps) for mixture in (ring(), grid())]
    print(f"\n{args.steps:,} steps of {BATCH}, {args.seeds} seeds; mean (least to most)\n")
    print("\n".join(_table(rows)))
    print(f"\nCalled collapsing within {_HEALTH_STEPS} steps, of {args.health_seeds} runs\n")
    found = []
    for mixture in (ring(), grid()):
        for name, settings in (("healthy", HEALTHY), ("collapsing", COLLAPSING)):
            steps = [called_collapsing(mixture, s, settings) for s in range(args.health_seeds)]
            called = [step for step in steps if step is not None]
            when = f"at step {min(called)} to {max(called)}" if called else ""
            row = {"mixture": mixture.name, "configuration": name, "called": len(called)}
            found.append({**row, "when": when})
    print("\n".join(_table(found)))


def _table(rows: Sequence[dict[str, Any]]) -> list[str]:
    return report.markdown_table(list(rows[0]), [list(map(str, row.values())) for row in rows])


if __name__ == "__main__":
    main()
