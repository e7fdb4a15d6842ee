"""What tests/test_simulated_cuda.py asks of the library on simulated devices, a case each.

Run as a program, in a process of its own, it prints a line of JSON for each.
"""

from __future__ import annotations

from support import simulated_cuda

if __name__ == "__main__":
    simulated_cuda.start()

import contextlib
import copy
import io
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import torch
from support.numerics import error
from support.ptx_runs import Outcome, serve
from support.simulated_cuda import take_launches, take_notes, two_devices

from fastgan import DCGANDiscriminator, DCGANGenerator, Engine, Loader
from fastgan.data.images import ImageSet
from fastgan.engine import engine as engine_module
from fastgan.engine.engine import resolve_device
from fastgan.ops import backend, tuning
from fastgan.ops.augment import augment
from fastgan.ops.backend import use_backend
from fastgan.ops.block import conv_bn_act
from fastgan.ops.bn_act import bn_act
from fastgan.ops.conv import conv
from fastgan.ops.gan_loss import gan_loss

NZ, CHANNELS, SIZE, BATCH = 6, 4, 16, 3
CUDA = torch.device("cuda", 0)


@contextlib.contextmanager
def fastest(*ways: str) -> Iterator[None]:
    """The first of ``ways`` that there is, else the first at all, has been measured fastest."""

    def measured(found: dict[str, Any], device: torch.device) -> dict[str, float]:
        assert device == CUDA
        order = [*(way for way in ways if way in found), *found]
        return {way: float(order.index(way)) for way in found}

    with (
        mock.patch.object(tuning, "_times", {}),
        mock.patch.object(tuning, "_read", lambda path: {}),
        mock.patch.object(tuning, "_write", lambda *result: None),
        mock.patch.object(tuning, "_measure", measured),
    ):
        yield


def message(call: Callable[[], object]) -> str:
    """What ``call`` raises."""
    try:
        call()
    except Exception as raised:
        return f"{type(raised).__name__}: {raised}"
    return "nothing was raised"


def launched() -> list[tuple[str, str]]:
    """The launches since the last call: backend and kernel, each once."""
    return sorted({(launch.backend, launch.name) for launch in take_launches()})


def networks() -> tuple[DCGANGenerator, DCGANDiscriminator]:
    torch.manual_seed(0)
    return DCGANGenerator(NZ, CHANNELS, 1, SIZE), DCGANDiscriminator(CHANNELS, 1, SIZE)


def batches(dtype: torch.dtype = torch.float32) -> list[tuple[torch.Tensor, torch.Tensor]]:
    draw = torch.Generator().manual_seed(1)
    return [
        (
            (torch.rand(BATCH, 1, SIZE, SIZE, generator=draw) * 2 - 1).to(dtype),
            torch.randn(BATCH, NZ, 1, 1, generator=draw).to(dtype),
        )
        for _ in range(2)
    ]


def make_engine(name: str, device: str, dtype: torch.dtype, **arguments: Any) -> Engine:
    found = (network.to(dtype) for network in networks())
    return Engine(*found, backend=name, device=device, capture=False, ema=0.9, **arguments)


def numbers_of(engine: Engine) -> dict[str, torch.Tensor]:
    assert engine._ema is not None
    parts = {"G": engine.netG, "D": engine.netD, "average": engine._ema.module}
    return {
        f"{part} {name}": value.clone()
        for part, network in parts.items()
        for name, value in network.state_dict().items()
        # The statistics of the average's batch norms are measured when they are asked for.
        if part != "average" or "running" not in name
    }


def stepped(engine: Engine) -> tuple[dict[str, torch.Tensor], list[str]]:
    """The numbers after two steps, and what the second one had to do with the host."""
    found = {}
    for i, (real, z) in enumerate(batches(engine._dtype)):
        # All but the first step has its batch on the device.
        given = (real, z) if i == 0 else (real.to(engine.device), z.to(engine.device))
        take_notes()
        stats = engine.step(given[0], noise=given[1])
        found |= {f"{name} {i}": value.clone() for name, value in stats._asdict().items()}
    notes = take_notes()
    return found | numbers_of(engine), notes


def whole_step(
    name: str, *ways: str, dtype: torch.dtype = torch.float32, precision: str = "fp32"
) -> Outcome:
    want, _ = stepped(make_engine("reference", "cpu", torch.float64))
    take_launches()
    with fastest(*ways):
        engine = make_engine(name, "cuda", dtype, precision=precision)
        got, notes = stepped(engine)
    assert got.keys() == want.keys()
    assert {value.device for value in got.values()} == {CUDA}
    launches = take_launches()
    errors = {key: error(value.cpu(), want[key].double()) for key, value in got.items()}
    return {
        "error": max(errors.values()),
        # Those that no update has had a part in.
        "first losses": max(errors["loss_d 0"], errors["d_real 0"], errors["d_fake 0"]),
        "notes": notes,
        "launches": sorted({(launch.backend, launch.name) for launch in launches}),
        "on_main_thread": all(launch.on_main_thread for launch in launches),
    }


def each_op(name: str, *ways: str, dtype: torch.dtype = torch.float32) -> Outcome:
    """Each public op forward and backward: its error, and what it launched."""
    torch.manual_seed(0)
    x, weight = torch.randn(BATCH, 3, 8, 8), torch.randn(4, 3, 4, 4)
    scale, shift = torch.rand(3) + 0.5, torch.randn(3)
    pixels = torch.randint(256, (BATCH, 8, 8, 3), dtype=torch.uint8)

    def ops(device: str, dtype: torch.dtype) -> dict[str, Callable[[], list[torch.Tensor]]]:
        def run(op: Callable[..., torch.Tensor], *given: torch.Tensor) -> list[torch.Tensor]:
            leaves = [t.detach().to(device, dtype).requires_grad_() for t in given]
            y = op(*leaves)
            y.sin().sum().backward()
            return [y.detach(), *(leaf.grad for leaf in leaves)]

        convolve = partial(conv, stride=2, padding=1, activation="tanh")
        return {
            "conv": lambda: run(convolve, x, weight),
            "bn_act": lambda: run(partial(bn_act, activation="tanh"), x, scale, shift),
            "gan_loss": lambda: run(lambda s: gan_loss(s, (1.0,))[0], x[:, 0, 0, 0]),
            "augment": lambda: [augment(pixels.to(device), dtype=dtype)],
        }

    found: Outcome = {}
    with fastest(*ways):
        for op, got in ops("cuda", dtype).items():
            with use_backend("reference"):
                want = ops("cpu", torch.float64)[op]()
            take_launches()
            try:
                with use_backend(name):
                    results = got()
            except Exception as raised:
                found[op] = {"raised": f"{type(raised).__name__}: {raised}"}
                continue
            pairs = zip(results, want, strict=True)
            found[op] = {
                "error": max(error(g.cpu(), w) for g, w in pairs),
                "launches": launched(),
            }
    return found


def cpp_by_environment() -> Outcome:
    x = torch.randn(2, 3, 8, 8, device="cuda")
    with mock.patch.dict(os.environ, FASTGAN_BACKEND="cpp"):
        engine = make_engine("auto", "cuda", torch.float32)
        return {
            "conv": message(lambda: conv(x, x[:, :, :3, :3])),
            "augment": str(augment(torch.zeros(1, 4, 4, 3, dtype=torch.uint8).cuda()).device),
            "step": message(lambda: engine.step(batches()[0][0])),
        }


def mixed_devices() -> Outcome:
    x, weight = torch.randn(2, 3, 8, 8), torch.randn(4, 3, 4, 4)

    def mixed(name: str) -> str:
        with use_backend(name):
            return message(lambda: conv(x.cuda(), weight, stride=2, padding=1))

    found = {name: mixed(name) for name in ("auto", *backend.BACKENDS)}
    found["torch"] = message(lambda: x.cuda() + x)
    with two_devices():
        found["devices"] = message(lambda: x.to("cuda:0") + x.to("cuda:1"))
    found["weights"] = message(lambda: networks()[0](torch.randn(1, NZ, 1, 1, device="cuda")))
    return found


def handed_in_from_the_host() -> Outcome:
    """It and the batch are moved; what is drawn is drawn on the device."""
    engine = make_engine("cuda", "cuda", torch.float32)
    (real, z), _ = batches()
    engine.step(real, noise=z)
    pixels = torch.randint(256, (BATCH, SIZE, SIZE, 1), dtype=torch.uint8)
    found = {}
    for name, given in {"both": (real, z), "pixels": (pixels, None)}.items():
        take_notes()
        engine.step(given[0], noise=given[1])
        found[name] = take_notes()
    take_notes()
    images = engine.sample(2)
    found["sample"] = take_notes()
    stats = engine.step(real.cuda(), noise=z.cuda())
    take_notes()
    stats.to_dict()
    found["to_dict"] = take_notes()
    found["devices"] = sorted({str(x.device) for x in (engine.generator, images, *stats)})
    return found


@two_devices()
def second_device() -> Outcome:
    """Kernels go to the device and stream of their tensors, whatever the present device is."""
    found: Outcome = {"device": str(resolve_device("cuda:1"))}
    x = torch.randn(2, 3, 8, 8, device="cuda:1")
    stream = torch.cuda.current_stream("cuda:0")

    def run() -> torch.Tensor:
        return conv_bn_act(x, x[:, :, :4, :4])

    for name in ("triton", "cuda"):
        take_launches()
        with use_backend(name):
            y = run()
            found[name] = [str(y.device), sorted({each.device for each in take_launches()})]
            with mock.patch.object(torch.cuda, "device_of", contextlib.nullcontext):
                found[f"{name}, another device"] = message(run)
    with (
        use_backend("cuda"),
        mock.patch.object(torch.cuda, "current_stream", lambda device: stream),
    ):
        found["cuda, another stream"] = message(run)
    found["present"] = torch.cuda.current_device()
    return found


def image_set() -> ImageSet:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (8, SIZE, SIZE, 1), dtype=np.uint8)
    return ImageSet(images, np.arange(8), tuple("abcdefgh"), "random", digest="0")


def loader(name: str, free: int) -> Outcome:
    """Batches on the device against those on the CPU, and what they had to do with the host."""
    options: dict[str, Any] = {"flip": True, "seed": 3}
    want = Loader(image_set(), BATCH, **options)
    take_notes()
    with mock.patch.object(torch.cuda, "mem_get_info", lambda device=None: (free, 80 << 30)):
        got = Loader(image_set(), BATCH, device="cuda", **options)
    found: Outcome = {"made": take_notes(), "batches": [], "same": [], "launches": []}
    for _ in range(4):
        take_launches()
        take_notes()
        with use_backend(name):
            images, labels = got.next_batch()
        found["batches"].append(take_notes())
        found["launches"].append([launch.backend for launch in take_launches()])
        want_images, want_labels = want.next_batch()
        assert images.device == labels.device == CUDA
        found["same"].append(
            torch.equal(images.cpu(), want_images) and torch.equal(labels.cpu(), want_labels)
        )
    return found


def attached_loader() -> Outcome:
    """What a step with a loader has to do with the host."""
    engine = make_engine("cuda", "cuda", torch.float32)
    engine.attach(Loader(image_set(), BATCH, flip=True, device="cuda"))
    engine.step()
    take_notes()
    engine.step()
    return {"notes": take_notes()}


def devices() -> Outcome:
    netG = networks()[0]
    found = {name: str(resolve_device(name)) for name in ("auto", "cuda", "cuda:0", "cpu")}
    found["of a network"] = str(resolve_device("auto", copy.deepcopy(netG).cuda()))
    for name in ("cuda:1", "meta", "xpu", "nowhere"):
        found[name] = message(partial(resolve_device, name))
    with mock.patch.object(torch.cuda, "is_available", lambda: False):
        found["auto without a GPU"] = str(resolve_device("auto"))
    return found


def checkpoint() -> Outcome:
    """A run that is saved on one device and goes on on another, or on the same."""
    (real, z), second = batches()
    engine = make_engine("cuda", "cuda", torch.float32)
    engine.step(real, noise=z)
    file = io.BytesIO()
    torch.save(engine.state_dict(), file)

    def loaded(device: str, name: str, where: str) -> tuple[Engine, list[str]]:
        file.seek(0)
        state = torch.load(file, map_location=where, weights_only=True)
        other = make_engine(name, device, torch.float32, seed=5)
        with mock.patch.object(engine_module.logger, "warning") as warned:
            other.load_state_dict(state)
        return other, [call.args[0] % call.args[1:] for call in warned.call_args_list]

    on_cpu, said = loaded("cpu", "reference", "cpu")
    resumed, silent = loaded("cuda", "cuda", "cpu")
    straight, _ = loaded("cuda", "cuda", "cuda")
    before = numbers_of(engine)
    found: Outcome = {
        "said": said,
        "said on the same device": silent,
        "same on the CPU": same(before, numbers_of(on_cpu)),
        "same on the device": same(before, numbers_of(resumed)),
    }
    # With noise of their own: the generator's state is saved too.
    for other in (engine, resumed, straight):
        other.step(second[0])
    found["goes on"] = same(numbers_of(engine), numbers_of(resumed))
    found["goes on from the device's tensors"] = same(numbers_of(engine), numbers_of(straight))
    on_cpu.step(second[0])
    back = make_engine("cuda", "cuda", torch.float32)
    back.load_state_dict(on_cpu.state_dict())
    found["same back on the device"] = same(numbers_of(on_cpu), numbers_of(back))
    found["where"] = sorted({str(value.device) for value in numbers_of(back).values()})
    return found


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    assert a.keys() == b.keys()
    return all(torch.equal(a[key].cpu(), b[key].cpu()) for key in a)


def autocast(name: str, low: torch.dtype) -> Outcome:
    """D's first blocks and the loss: dtypes, errors, and what was launched."""
    torch.manual_seed(0)
    x, weight = torch.randn(4, 3, 8, 8), torch.randn(4, 3, 4, 4) / 8
    scale, shift = torch.rand(4) + 0.5, torch.randn(4)

    def run(device: str, dtype: torch.dtype) -> list[torch.Tensor]:
        given = [t.to(device, dtype).requires_grad_() for t in (x, weight, scale, shift)]
        y = conv_bn_act(given[0], given[1], None, *given[2:], groups=2)
        loss, _ = gan_loss(y.flatten(1).sum(1), (1.0, 0.0))
        loss.sum().backward()
        return [y.detach(), loss.detach(), *(t.grad for t in given)]

    with use_backend("reference"):
        want = run("cpu", torch.float64)
    take_launches()
    with use_backend(name), torch.autocast("cuda", low):
        got = run("cuda", torch.float32)
    return {
        "dtypes": [str(value.dtype).removeprefix("torch.") for value in got],
        "errors": [error(g.cpu(), w) for g, w in zip(got, want, strict=True)],
        "launches": launched(),
    }


def planted_in_the_loss(fault: Callable[[torch.Tensor], torch.Tensor]) -> Outcome:
    """A loss that does more than it should; the notes of a step, or what it raises."""

    def faulty(logits: torch.Tensor, *others: Any, **options: Any) -> Any:
        return gan_loss(fault(logits), *others, **options)

    with mock.patch.object(engine_module, "gan_loss", faulty):
        engine = make_engine("reference", "cuda", torch.float32)
        found: Outcome = {}
        found["raised"] = message(lambda: found.update(notes=stepped(engine)[1]))
    return {"was": found["raised"], "notes": found.get("notes", [])}


def reads_a_number(logits: torch.Tensor) -> torch.Tensor:
    return logits * 1.0 if logits.sum().item() else logits


def goes_through_the_host(logits: torch.Tensor) -> torch.Tensor:
    return logits.cpu().to(logits.device)


def picks_by_a_mask(logits: torch.Tensor) -> torch.Tensor:
    return logits[torch.ones_like(logits, dtype=torch.bool)]


def scales_by_a_number_of_the_host(logits: torch.Tensor) -> torch.Tensor:
    return logits * torch.tensor(1.0)


def adds_what_is_on_the_host(logits: torch.Tensor) -> torch.Tensor:
    return logits + torch.zeros(logits.shape)


def output_on_the_host(name: str) -> Outcome:
    """A kernel that is given memory of the host."""
    x = torch.randn(2, 3, 8, 8, device="cuda")

    def on_the_host(like: torch.Tensor, *sizes: int, dtype: Any = None) -> torch.Tensor:
        return torch.empty(sizes, dtype=dtype or like.dtype, memory_format=torch.channels_last)

    with use_backend(name), mock.patch("fastgan.ops.bn_act.empty_images", on_the_host):
        return {"was": message(lambda: bn_act(x))}


def rate_of_the_wrong_dtype() -> Outcome:
    """On a GPU the fused kernel reads a float32."""
    p = torch.zeros(3, device="cuda", requires_grad=True)
    p.grad = torch.ones_like(p)
    rate = torch.tensor(1e-3, dtype=torch.float64, device="cuda")
    optimizer = torch.optim.Adam([p], lr=rate, fused=True, capturable=True)
    return {"was": message(optimizer.step)}


def backward_in_its_own_thread() -> Outcome:
    """As autograd does on a GPU where the engine does not keep it from it."""
    engine = make_engine("cuda", "cuda", torch.float32)
    take_launches()
    with mock.patch.object(
        torch.autograd, "set_multithreading_enabled", lambda on: contextlib.nullcontext()
    ):
        stepped(engine)
    return {"on_main_thread": [launch.on_main_thread for launch in take_launches()]}


CASES: dict[str, Callable[[], Outcome]] = {
    "step reference": partial(whole_step, "reference", dtype=torch.float64),
    "step triton": partial(whole_step, "triton"),
    "step cuda": partial(whole_step, "cuda"),
    "step auto": partial(whole_step, "auto", "cuda", "direct", "64x64"),
    "step bf16": partial(whole_step, "cuda", precision="bf16"),
    "step fp16": partial(whole_step, "cuda", precision="fp16"),
    "ops auto triton": partial(each_op, "auto", "triton"),
    "ops auto cuda": partial(each_op, "auto", "cuda", "64x64"),
    "ops auto torch": partial(each_op, "auto", "torch", "cuda"),
    "ops auto float64": partial(each_op, "auto", dtype=torch.float64),
    "ops triton float64": partial(each_op, "triton", dtype=torch.float64),
    "ops cuda float64": partial(each_op, "cuda", dtype=torch.float64),
    "cpp by the environment": cpp_by_environment,
    "mixed devices": mixed_devices,
    "handed in from the host": handed_in_from_the_host,
    "second device": second_device,
    "loader auto resident": partial(loader, "auto", 80 << 30),
    "loader auto not resident": partial(loader, "auto", 100),
    "loader cuda resident": partial(loader, "cuda", 80 << 30),
    "loader cuda not resident": partial(loader, "cuda", 100),
    "attached loader": attached_loader,
    "devices": devices,
    "checkpoint": checkpoint,
    **{
        f"autocast {name} {str(low).removeprefix('torch.')}": partial(autocast, name, low)
        for name in ("auto", "reference", "triton", "cuda")
        for low in (torch.bfloat16, torch.float16)
    },
    "fault: item": partial(planted_in_the_loss, reads_a_number),
    "fault: cpu": partial(planted_in_the_loss, goes_through_the_host),
    "fault: mask": partial(planted_in_the_loss, picks_by_a_mask),
    "fault: number": partial(planted_in_the_loss, scales_by_a_number_of_the_host),
    "fault: rate": rate_of_the_wrong_dtype,
    "fault: left on the CPU": partial(planted_in_the_loss, adds_what_is_on_the_host),
    "fault: output triton": partial(output_on_the_host, "triton"),
    "fault: output cuda": partial(output_on_the_host, "cuda"),
    "fault: threads": backward_in_its_own_thread,
}

if __name__ == "__main__":
    simulated_cuda.run_kernels()
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    serve(CASES)
    # Autograd's threads for the devices do not know that the process ends: torch, which leaves them
    # running, aborts at times as its own objects go.
    sys.stdout.flush()
    os._exit(0)
