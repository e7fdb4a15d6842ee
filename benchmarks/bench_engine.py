"""Images a second of the whole alternating step: the example's loop, eager and compiled, and the
engine on each backend. ``fastgan bench`` is the command.

The variants of a cell start from the same weights and see the same images and noise. Their first
steps are both the warm-up and the parity check, which a variant has to pass to get a figure. Then
they take turns, A B C A B C, so that what slows the machine down slows them all. Every variant
reads its five numbers after each step, as the example does.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from fastgan.benchmarks import example_dcgan as example
from fastgan.benchmarks.machine import no_collection, synchronize
from fastgan.benchmarks.plan import NZ, OTHERS, VARIANTS, Cell, Recipe
from torch import Tensor, nn
from torch.utils._pytree import keystr, tree_leaves_with_path

from fastgan.choices import Backend, Capture, Precision
from fastgan.engine.engine import Engine, StepStats
from fastgan.errors import InputError, NotBuiltError, RunError
from fastgan.nn.dcgan import DCGANDiscriminator, DCGANGenerator
from fastgan.ops.backend import machine_reasons
from fastgan.seeding import generator

# Steps of the check that leave the weights where they are; one more moves them.
HELD_STEPS = 2
CHECK_STEPS = HELD_STEPS + 1
# Float64 has no fast convolution on the CPU, and with the weights held the rounding hardly depends
# on the batch.
TRUTH_IMAGES = 8
# How many times the example's own rounding a variant may differ from it.
LIMIT = 20.0
# What counts as rounding at least. Forward, it is a few units in the last place. Backward, it moves
# an activation in a million across a kink, which changes a gradient by the root of that. Adam then
# goes by signs, which the smallest gradients change.
LEAST_ROUNDING = {
    "numbers": 1e-6,
    "running statistics": 1e-6,
    "gradients": 1e-3,
    "numbers after an update": 1e-4,
    "weight updates": 5e-3,
}
# What autocast to bfloat16 may differ from the example by. It has 8 bits, float32 has 24, and no
# multiple of that rounding fits: these are at least twice what was found, with networks of the
# default width, on the CPU. They tell a wrong learning rate or a lost term from rounding.
AMP_LIMITS = {
    "numbers": 0.02,
    "running statistics": 0.01,
    "gradients": 0.4,
    "numbers after an update": 0.03,
    "weight updates": 0.5,
}
LEAST_ROUNDS = 3

CHECK = (
    f"on the same weights, images and noise, {HELD_STEPS} steps with a learning rate of 0 and one "
    f"that moves the weights; a variant may differ from the example by {LIMIT:g} times what the "
    f"example's float32 differs from its float64 on {TRUTH_IMAGES} images, which counts as at "
    f"least {', '.join(f'{least:g} ({kind})' for kind, least in LEAST_ROUNDING.items())}"
)

Batch = tuple[Tensor, Tensor]
# What a variant computed in the check: kind -> name -> float64 tensor.
Observations = dict[str, dict[str, Tensor]]


class Trainer(NamedTuple):
    """A variant at work; ``step(real, z)`` returns the example's five numbers."""

    step: Callable[[Tensor, Tensor], Sequence[float]]
    netG: nn.Module
    netD: nn.Module
    opt_g: torch.optim.Optimizer
    opt_d: torch.optim.Optimizer


class Variant(NamedTuple):
    """One way to take the step.

    Attributes:
        name: one of ``plan.VARIANTS``.
        build: makes it of the example's networks, which it may change and are on the device.
        excuses: the errors which mean that it cannot run here, and not that it is wrong.
        limits: by kind, what it may differ from the example by; None for what CHECK says.
    """

    name: str
    build: Callable[[nn.Module, nn.Module], Trainer]
    excuses: tuple[type[Exception], ...] = ()
    limits: Mapping[str, float] | None = None


class Effort(NamedTuple):
    """How long to measure one cell.

    Attributes:
        seconds: for all rounds of a cell together; there are at least ``LEAST_ROUNDS``.
        rounds: if given, so many instead.
        turn: seconds that a variant steps in one round, at least; always one step.
    """

    seconds: float
    rounds: int | None = None
    turn: float = 0.3


def select_variants(
    names: Sequence[str] = (), *, compiled: bool = True, device: torch.device | None = None
) -> list[Variant]:
    """The variants called ``names`` and the example, or all that this machine has for ``device``.

    Args:
        names: of ``plan.VARIANTS``.
        compiled: whether those of torch.compile are among all.
        device: where they will be measured; the CPU where it is None.

    Raises:
        NotBuiltError: a variant was named that cannot run there; the message says why.
    """
    device_type = "cpu" if device is None else device.type
    chosen = []
    for name, recipe in VARIANTS.items():
        if names and name not in {OTHERS[0], *names}:
            continue
        if not names and not compiled and recipe.kind == "compile":
            continue
        reasons = _obstacles(recipe, device_type)
        if not reasons:
            chosen.append(make_variant(name))
        elif names:
            raise NotBuiltError(f"--variants: {name!r} cannot run here: {'; '.join(reasons)}")
    return chosen


def _obstacles(recipe: Recipe, device_type: str) -> list[str]:
    elsewhere = recipe.obstacle(device_type)
    if elsewhere:
        return [elsewhere]
    ours = recipe.kind == "fastgan" and recipe.backend != "auto"
    return machine_reasons(recipe.backend) if ours else []


def make_variant(name: str) -> Variant:
    """The variant ``name`` of ``plan.VARIANTS``, whether it can run here or not."""
    recipe = VARIANTS[name]
    if recipe.kind == "fastgan":
        build = functools.partial(
            engine_trainer,
            backend=recipe.backend,
            precision=recipe.precision,
            capture=recipe.capture,
        )
        limits = AMP_LIMITS if recipe.low_precision else None
        return Variant(name, build, (InputError, NotBuiltError), limits)
    compiled = recipe.kind == "compile"
    build = functools.partial(
        example_trainer,
        channels_last=recipe.channels_last,
        amp=recipe.amp,
        compiled=recipe.mode if compiled else None,
    )
    # A compiler of the machine's takes part, which may be missing or fail in any way.
    excuses = (Exception,) if compiled else ()
    return Variant(name, build, excuses, AMP_LIMITS if recipe.low_precision else None)


def example_trainer(
    netG: nn.Module,
    netD: nn.Module,
    *,
    channels_last: bool = False,
    amp: bool = False,
    compiled: str | None = None,
) -> Trainer:
    """The example's loop, its networks in another format, dtype or compiled where asked for.

    Args:
        netG, netD: the example's networks.
        channels_last: their memory format.
        amp: run them under autocast to bfloat16; weights, loss and Adam stay float32.
        compiled: the mode of torch.compile.
    """
    layout = torch.channels_last if channels_last else torch.contiguous_format
    for net in (netG, netD):
        net.to(memory_format=layout)
        if amp:
            _autocast(net)
        if compiled is not None:
            net.compile(dynamic=False, mode=compiled)
    trainer = example.ExampleTrainer(netG, netD)

    def step(real: Tensor, z: Tensor) -> Sequence[float]:
        if compiled == "reduce-overhead":
            # Both networks' graphs of a step share one pool: what one leaves lives until the next.
            torch.compiler.cudagraph_mark_step_begin()
        return trainer.step(real.contiguous(memory_format=layout), z)

    return Trainer(step, netG, netD, trainer.optimizerG, trainer.optimizerD)


def _autocast(net: nn.Module) -> None:
    """Let ``net`` compute in bfloat16, and return float32."""
    device_type = next(net.parameters()).device.type
    inside = torch.autocast(device_type, dtype=torch.bfloat16)(net.forward)
    net.forward = lambda x: inside(x).float()
    for module in net.modules():
        if isinstance(module, nn.Sigmoid):
            # Autocast refuses BCELoss, as a probability in bfloat16 is 0 or 1 too soon; with the
            # logits in float32 the loss is that of BCEWithLogitsLoss, which it wants instead.
            module.register_forward_pre_hook(lambda module, inputs: (inputs[0].float(),))


def engine_trainer(
    netG: nn.Module,
    netD: nn.Module,
    *,
    backend: Backend,
    precision: Precision = "fp32",
    capture: Capture = "auto",
) -> Trainer:
    """The engine, on fastgan's own networks with the weights, and the dtype, of the example's."""
    weight = next(netG.parameters())
    engine = Engine(
        DCGANGenerator.from_state_dict(netG.state_dict()).to(weight.dtype),
        DCGANDiscriminator.from_state_dict(netD.state_dict()).to(weight.dtype),
        backend=backend,
        precision=precision,
        capture=capture,
        device=weight.device,
    )

    def step(real: Tensor, z: Tensor) -> Sequence[float]:
        return list(engine.step(real, noise=z).to_dict().values())

    return Trainer(step, engine.netG, engine.netD, engine.opt_g, engine.opt_d)


def measure_cell(
    cell: Cell,
    variants: Sequence[Variant],
    effort: Effort,
    *,
    device: torch.device,
    seed: int = 0,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Check and time ``variants``, the first of which is the example, on ``cell``.

    Args:
        cell: the workload.
        variants: what to measure, in the order of their turns.
        effort: how long.
        device: where.
        seed: of the weights, images and noise.
        say: takes what is being done, a few words.

    Returns:
        What ``bench.json`` has of a cell, see :func:`fastgan.benchmarks.report.table`: numbers,
        strings, lists and dicts only.

    Raises:
        RunError: the example itself does not work on ``device``.
    """
    say("float64 truth")
    netG, netD, batches = inputs(cell, seed)
    rounding = _rounding(netG, netD, batches, device)
    netG.to(device)
    netD.to(device)
    batches = [(real.to(device), z.to(device)) for real, z in batches]
    # Each cell gets the specialisations that it would get alone.
    torch.compiler.reset()

    trainers: dict[str, Trainer] = {}
    entries: list[dict[str, Any]] = []
    reference: Observations = {}
    for variant in variants:
        say(f"check and warm-up: {variant.name}")
        entry: dict[str, Any] = {"name": variant.name, "status": "ok"}
        entries.append(entry)
        try:
            trainer = variant.build(copy.deepcopy(netG), copy.deepcopy(netD))
            seen = observe(trainer, batches)
        except variant.excuses as error:
            entry |= {"status": "cannot run", "reason": _one_line(error)}
            continue
        reference = reference or seen
        deviation = deviations(seen, reference)
        limits = variant.limits or {kind: LIMIT * size for kind, size in rounding.items()}
        entry["deviation"] = {k: d if math.isfinite(d) else None for k, d in deviation.items()}
        entry["limits"], entry["own_limits"] = dict(limits), variant.limits is not None
        wrong = [k for k, d in deviation.items() if not d <= limits[k]]
        if wrong:
            entry |= {"status": "differs", "reason": _difference(wrong, deviation, limits)}
        else:
            trainers[variant.name] = trainer

    seconds = _rounds(trainers, batches, effort, device, say)
    for entry in entries:
        if entry["name"] in seconds:
            entry |= _figures(entry["name"], seconds, cell)
    return {
        "image_size": cell.image_size,
        "nc": cell.nc,
        "batch_size": cell.batch_size,
        "ngf": cell.ngf,
        "ndf": cell.ndf,
        "gflop_per_step": cell.step_gflop(),
        "rounds": len(next(iter(seconds.values()))),
        "rounding": rounding,
        "variants": entries,
    }


def inputs(cell: Cell, seed: int) -> tuple[nn.Module, nn.Module, list[Batch]]:
    """The example's networks on the CPU, and a batch for each step of the check."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        netG = example.Generator(NZ, cell.ngf, cell.nc, cell.image_size)
        netD = example.Discriminator(cell.ndf, cell.nc, cell.image_size)
        netG.apply(example.weights_init)
        netD.apply(example.weights_init)
    draw = generator(seed, "bench")
    shape = (cell.batch_size, cell.nc, cell.image_size, cell.image_size)
    batches = [
        (
            torch.rand(shape, generator=draw) * 2 - 1,
            torch.randn(cell.batch_size, NZ, 1, 1, generator=draw),
        )
        for _ in range(CHECK_STEPS)
    ]
    return netG, netD, batches


def _rounding(
    netG: nn.Module, netD: nn.Module, batches: Sequence[Batch], device: torch.device
) -> dict[str, float]:
    """How far the example in float32 on ``device`` is from itself in float64, by kind."""

    def seen(device: torch.device, dtype: torch.dtype) -> Observations:
        nets = (copy.deepcopy(net).to(device, dtype) for net in (netG, netD))
        few = [
            (real[:TRUTH_IMAGES].to(device, dtype), z[:TRUTH_IMAGES].to(device, dtype))
            for real, z in batches
        ]
        return observe(example_trainer(*nets), few)

    truth = seen(torch.device("cpu"), torch.float64)  # which not every accelerator has
    deviation = deviations(seen(device, torch.float32), truth)
    if not all(math.isfinite(d) for d in deviation.values()):
        raise RunError(f"the example's own loop gives numbers on {device} that are not finite")
    return {kind: max(d, LEAST_ROUNDING[kind]) for kind, d in deviation.items()}


def observe(trainer: Trainer, batches: Sequence[Batch]) -> Observations:
    """Take a step on each batch, and keep what can be compared.

    Adam's first steps go by the sign of the gradient, whatever its size, and so make rounding
    large. Therefore the weights are held at first. The gradients are read off Adam's first moment,
    which after one step is ``(1 - beta1)`` times the gradient, however the variant came by it.
    """
    held, moving = batches[:HELD_STEPS], batches[HELD_STEPS:]
    seen: Observations = {}
    numbers = []
    with _learning_rate_of_zero(trainer.opt_g, trainer.opt_d):
        for real, z in held:
            numbers.append(trainer.step(real, z))
            if len(numbers) == 1:
                seen["gradients"] = _of_weights(
                    trainer, lambda p, optimizer: optimizer.state[p]["exp_avg"]
                )
    seen["numbers"] = _by_name(numbers)
    seen["running statistics"] = {
        f"{name}.{key}": _float64(value)
        for name, net, _ in _networks(trainer)
        for key, value in net.named_buffers()
        if value.is_floating_point()
    }
    before = _of_weights(trainer, lambda p, _: p)
    seen["numbers after an update"] = _by_name([trainer.step(real, z) for real, z in moving])
    after = _of_weights(trainer, lambda p, _: p)
    seen["weight updates"] = {name: after[name] - before[name] for name in before}
    return seen


def _networks(trainer: Trainer) -> list[tuple[str, nn.Module, torch.optim.Optimizer]]:
    return [("netG", trainer.netG, trainer.opt_g), ("netD", trainer.netD, trainer.opt_d)]


def _of_weights(
    trainer: Trainer, read: Callable[[nn.Parameter, torch.optim.Optimizer], Tensor]
) -> dict[str, Tensor]:
    return {
        f"{name}.{key}": _float64(read(p, optimizer))
        for name, net, optimizer in _networks(trainer)
        for key, p in net.named_parameters()
    }


def _by_name(numbers: Sequence[Sequence[float]]) -> dict[str, Tensor]:
    table = torch.tensor(numbers, dtype=torch.float64)
    return dict(zip(StepStats._fields, table.T, strict=True))


@contextlib.contextmanager
def _learning_rate_of_zero(*optimizers: torch.optim.Optimizer) -> Iterator[None]:
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    rates = [copy.deepcopy(group["lr"]) for group in groups]
    # A captured step reads the rate where it lies: a tensor keeps its place.
    for group in groups:
        group["lr"] *= 0
    try:
        yield
    finally:
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] += rate


def _float64(value: Tensor) -> Tensor:
    # A copy always: the next step writes into the tensor.
    return value.detach().to("cpu", torch.float64, copy=True)


def differences(a: Any, b: Any) -> list[str]:
    """Where two nested states are not the same to the bit: the paths of leaves."""
    ours, theirs = tree_leaves_with_path(a), tree_leaves_with_path(b)
    if len(ours) != len(theirs):
        return [f"{len(ours)} leaves, and {len(theirs)}"]
    return [
        keystr(path)
        for (path, x), (other, y) in zip(ours, theirs, strict=True)
        if path != other or not (torch.equal(x, y) if isinstance(x, Tensor) else x == y)
    ]


def deviations(seen: Observations, reference: Observations) -> dict[str, float]:
    """The largest relative difference of each kind, by the norms of the tensors."""
    largest = {}
    for kind, tensors in reference.items():
        relative = [
            (seen[kind][name] - value).norm() / value.norm().clamp(min=1e-300)
            for name, value in tensors.items()
        ]
        # max() of torch, which passes on a NaN
        largest[kind] = torch.stack(relative).max().item()
    return largest


def _difference(
    wrong: Sequence[str], deviation: Mapping[str, float], limits: Mapping[str, float]
) -> str:
    parts = (f"{k} by {deviation[k]:.1e}, allowed {limits[k]:.1e}" for k in wrong)
    return f"differs from the example: {'; '.join(parts)}"


def _rounds(
    trainers: dict[str, Trainer],
    batches: Sequence[Batch],
    effort: Effort,
    device: torch.device,
    say: Callable[[str], None],
) -> dict[str, list[float]]:
    """Seconds a step of each trainer in each round."""
    seconds: dict[str, list[float]] = {name: [] for name in trainers}
    started = time.perf_counter()
    done = 0
    while _go_on(done, time.perf_counter() - started, effort):
        with no_collection():
            for name, trainer in trainers.items():
                say(f"round {done + 1}: {name}")
                seconds[name].append(_take_turn(trainer, batches, effort.turn, device))
        done += 1
    return seconds


def _go_on(done: int, elapsed: float, effort: Effort) -> bool:
    if effort.rounds is not None:
        return done < effort.rounds
    return done < LEAST_ROUNDS or elapsed * (done + 1) / done <= effort.seconds


def _take_turn(
    trainer: Trainer, batches: Sequence[Batch], at_least: float, device: torch.device
) -> float:
    """Seconds a step, over so many steps as take ``at_least`` seconds."""
    synchronize(device)
    steps = 0
    started = time.perf_counter()
    while True:
        trainer.step(*batches[steps % len(batches)])
        steps += 1
        if time.perf_counter() - started >= at_least:
            break
    synchronize(device)
    return (time.perf_counter() - started) / steps


def _figures(name: str, seconds: dict[str, list[float]], cell: Cell) -> dict[str, Any]:
    p10, median, p90 = np.percentile([cell.batch_size / s for s in seconds[name]], (10, 50, 90))
    ratio_to = OTHERS[0]
    if name not in OTHERS:
        ratio_to = min(set(OTHERS) & seconds.keys(), key=lambda n: statistics.median(seconds[n]))
    # Of each round by itself, in which both had the same machine.
    ratios = [a / b for a, b in zip(seconds[ratio_to], seconds[name], strict=True)]
    return {
        "images_per_second": {"median": float(median), "p10": float(p10), "p90": float(p90)},
        "ratio": statistics.median(ratios),
        "ratio_to": ratio_to,
        "gflop_per_second": float(median) * cell.step_gflop() / cell.batch_size,
        "seconds_per_step": seconds[name],
    }


def _one_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), repr(error))
