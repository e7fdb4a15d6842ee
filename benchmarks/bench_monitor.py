"""What watching a GAN's health costs: steps with the monitor of ``fastgan train``, and without.

``python -m fastgan.benchmarks.bench_monitor``, or with ``--rounds 3 --ngf 8`` to see that it works.
Two engines of the same networks take turns, each time for two measurements' steps; both have
to end with the same weights.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence

import numpy as np
import torch
from fastgan.benchmarks import bench_engine, machine, report

from fastgan import DCGANDiscriminator, DCGANGenerator, Engine, ImageSet, Loader
from fastgan.metrics.health import Vitals

_MEASUREMENTS = 2


def make(args: argparse.Namespace, monitor: Vitals | None) -> Engine:
    """An engine with batches to draw from."""
    size, nc = args.image_size, args.nc
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        netG = DCGANGenerator(100, args.ngf, nc, size)
        netD = DCGANDiscriminator(args.ndf, nc, size)
    pixels = np.random.default_rng(0).integers(0, 256, (2048, size, size, nc), dtype=np.uint8)
    engine = Engine(netG, netD, ema=0.999, monitor=monitor, device=args.device)
    data = ImageSet(pixels, None, (), "noise", "noise")
    engine.attach(Loader(data, args.batch_size, device=engine.device))
    return engine


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--nc", type=int, default=3)
    parser.add_argument("--ngf", type=int, default=64)
    parser.add_argument("--ndf", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    vitals = Vitals()
    engines = {"monitored": make(args, vitals), "plain": make(args, None)}
    # One tuning for both: they are to differ in the monitor alone.
    for engine in engines.values():
        engine.step()
    engines["plain"].load_state_dict(engines["monitored"].state_dict())
    record = {"machine": machine.describe(device), "measured": machine.measure(device)}
    print("\n".join(report.machine_lines(record)), flush=True)
    steps = _MEASUREMENTS * vitals.every
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    with machine.no_collection():
        for i in range(args.rounds):
            # Who comes first changes: what the one leaves in the caches is the other's.
            for name in list(engines)[:: 1 if i % 2 else -1]:
                machine.synchronize(device)
                started = time.perf_counter()
                for _ in range(steps):
                    engines[name].step()
                machine.synchronize(device)
                seconds[name].append((time.perf_counter() - started) / steps)
    states = [engine.state_dict() for engine in engines.values()]
    differ = bench_engine.differences(*states)
    if differ:
        raise SystemExit(f"the monitor changes the training: {', '.join(differ[:3])}")
    ratios = [a / b for a, b in zip(seconds["monitored"], seconds["plain"], strict=True)]
    quarter = statistics.quantiles(ratios, n=4)
    print(
        f"{args.image_size}x{args.image_size}x{args.nc}, batch {args.batch_size}, ngf {args.ngf}, "
        f"ndf {args.ndf}: {statistics.median(seconds['plain']) * 1e3:.2f} ms a step; monitored "
        f"every {vitals.every} steps it takes {statistics.median(ratios) - 1:+.2%} (half of "
        f"{args.rounds} rounds from {quarter[0] - 1:+.2%} to {quarter[2] - 1:+.2%}); the weights "
        "are the same"
    )


if __name__ == "__main__":
    main()
