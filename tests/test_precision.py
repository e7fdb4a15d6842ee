"""Precision: the dtypes of a step; scaled gradients, skipped updates, recovery, on the CPU."""

import copy
import logging

import numpy as np
import pytest
import torch
from fastgan.benchmarks import bench_engine
from support import training_parity
from torch import nn

from fastgan import (
    DCGANDiscriminator,
    DCGANGenerator,
    Engine,
    ImageSet,
    Loader,
    load_images,
    saying,
)
from fastgan.engine.adam import Adam
from fastgan.engine.precision import Precision, ScaledUpdater
from fastgan.errors import InputError

SIZE, NZ, CHANNELS = 16, 6, 4
CPU = torch.device("cpu")


def make(engine=Engine, **kwargs):
    torch.manual_seed(0)
    networks = DCGANGenerator(NZ, CHANNELS, 1, SIZE), DCGANDiscriminator(CHANNELS, 1, SIZE)
    return engine(*networks, device="cpu", **kwargs)


def real(n=8, seed=0):
    return torch.rand(n, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def weights(network):
    return {name: value.clone() for name, value in network.state_dict().items()}


def same(a, b):
    return not bench_engine.differences(a, b)


def test_bf16_computes_in_bf16_and_keeps_float32():
    engine = make(precision="bf16", ema=0.9)
    seen = {}
    for network in (engine.netG, engine.netD):
        network.main[-2].register_forward_hook(
            lambda module, args, out: seen.update({type(module).__name__: out.dtype})
        )
    before = weights(engine.netG)
    stats = engine.step(real())
    assert set(seen.values()) == {torch.bfloat16}
    assert not same(before, engine.netG.state_dict())
    kept = [
        *engine.netG.state_dict().values(),
        *engine.netD.state_dict().values(),
        *(p.grad for p in engine.netG.parameters()),
        *(v for s in engine.opt_d.state.values() for v in s.values()),
    ]
    assert {x.dtype for x in kept if x.is_floating_point()} == {torch.float32}
    assert {x.dtype for x in stats} == {torch.float32}
    assert engine.sample(3).dtype == torch.float32


def test_a_steps_gradients_in_bf16_are_float32s_to_its_roundings():
    def gradients(precision):
        engine = make(precision=precision, backend="reference")
        engine.step(real())
        parts = [p.grad.flatten() for n in (engine.netG, engine.netD) for p in n.parameters()]
        return torch.cat(parts)

    got, want = gradients("bf16"), gradients("fp32")
    assert 0.0 < (got - want).norm() < 0.1 * want.norm()


def test_every_network_and_kind_of_output_trains_in_bf16():
    """What autocast refuses, a loss on probabilities, is computed in float32."""
    netG, netD = DCGANGenerator(NZ, CHANNELS, 1, SIZE), DCGANDiscriminator(CHANNELS, 1, SIZE)
    for d_output, last in (("logits", nn.Identity()), ("probability", nn.Hardsigmoid())):
        discriminator = nn.Sequential(copy.deepcopy(netD), last)
        engine = Engine(
            copy.deepcopy(netG), discriminator, precision="bf16", d_output=d_output, device="cpu"
        )
        assert all(np.isfinite(list(engine.step(real()).to_dict().values())))


def test_weights_in_bf16_alone_do_not_track_float32():
    """What master weights are for: an update is smaller than a unit in the last of 8 bits."""
    digits = load_images("digits", image_size=32)

    def lost_updates(dtype, precision):
        torch.manual_seed(0)
        networks = DCGANGenerator(NZ, 8, 1, 32).to(dtype), DCGANDiscriminator(8, 1, 32).to(dtype)
        engine = Engine(*networks, precision=precision, backend="reference", device="cpu")
        engine.attach(Loader(digits, 8, dtype=dtype))
        for _ in range(3):
            engine.step()
        before = weights(engine.netG)
        engine.step()
        after = engine.netG.state_dict()
        name = "main.1.weight"  # of a batch norm: about 1, where bfloat16 has steps of 1/128
        return (after[name] == before[name]).float().mean()

    assert lost_updates(torch.float32, "bf16") == 0.0
    assert lost_updates(torch.bfloat16, "fp32") > 0.5


def test_the_bound_of_the_tracking_test_is_not_met_by_another_learning_rate(monkeypatch):
    settings = {"backend": "reference", "precision": "bf16", "lr": 6e-4}
    monkeypatch.setitem(
        training_parity.SUBJECTS, "fault", training_parity.Subject(settings, 2.0**-9)
    )
    digits = load_images("digits", image_size=32)
    assert not training_parity.measure("fault", digits, 32, 8, 8, steps=200).within


class Scaled(Engine):
    """bfloat16 on the CPU with the scalers that float16 has on a GPU; plants what it is told."""

    planted = None

    def __init__(self, *args, **kwargs):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                Precision, "updater", lambda self, optimizer: ScaledUpdater(optimizer, CPU)
            )
            super().__init__(*args, precision="bf16", **kwargs)

    def reduce_gradients(self, params):
        first = next(iter(params))
        if self.planted and first is next(self.planted[0].parameters()):
            first.grad[0, -1, 0, 1] = self.planted[1]


def scale(engine, name):
    return engine.state_dict()[name]["scale"]


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize(("hit", "other"), [("D", "G"), ("G", "D")])
def test_an_update_that_overflows_is_skipped_and_no_other(hit, other, value):
    engine = make(Scaled)
    engine.step(real())
    struck, spared = getattr(engine, f"net{hit}"), getattr(engine, f"net{other}")
    engine.planted = struck, value
    count = {
        name: next(iter(getattr(engine, f"opt_{name.lower()}").state.values()))["step"]
        for name in (hit, other)
    }
    held = [p.detach().clone() for p in struck.parameters()]
    moved = [p.detach().clone() for p in spared.parameters()]
    moments = copy.deepcopy(getattr(engine, f"opt_{hit.lower()}").state_dict())
    steps = {name: int(value) for name, value in count.items()}
    engine.step(real(seed=1))
    assert all(torch.equal(a, b) for a, b in zip(held, struck.parameters(), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(moved, spared.parameters(), strict=True))
    for state, now in zip(
        moments["state"].values(),
        getattr(engine, f"opt_{hit.lower()}").state_dict()["state"].values(),
        strict=True,
    ):
        assert all(torch.equal(state[key], now[key]) for key in state)
    assert {name: int(value) for name, value in count.items()} == {
        hit: steps[hit],
        other: steps[other] + 1,
    }
    assert scale(engine, f"scale_{hit.lower()}") == 2.0**15
    assert scale(engine, f"scale_{other.lower()}") == 2.0**16
    # And recovers.
    engine.planted = None
    engine.step(real(seed=2))
    assert not any(torch.equal(a, b) for a, b in zip(held, struck.parameters(), strict=True))
    assert all(bool(p.isfinite().all()) for p in struck.parameters())


def test_scaled_updates_are_those_without_a_scale():
    """A power of two leaves every digit as it was."""
    plain, scaled = make(precision="bf16"), make(Scaled)
    for i in range(3):
        for engine in (plain, scaled):
            engine.step(real(seed=i))
    assert same(plain.netG.state_dict(), scaled.netG.state_dict())
    assert same(plain.netD.state_dict(), scaled.netD.state_dict())


def test_the_scale_falls_until_gradients_fit_and_grows_again():
    p = nn.Parameter(torch.ones(3, dtype=torch.float16))
    master = nn.Parameter(torch.ones(3))
    updater = ScaledUpdater(Adam([master], lr=1e-3, fused=True, capturable=True), CPU)
    updater._scaler.set_growth_interval(3)
    scales = []
    for _ in range(8):
        # Its gradient is 8: scaled by 2^16 or 2^13 beyond float16, by 2^12 within.
        updater.backward((p.float() * 8.0).sum())
        master.grad, p.grad = p.grad.float(), None
        updater.step()
        scales.append(updater.state_dict()["scale"])
    expected = [2.0**e for e in (15, 14, 13, 12, 12, 12, 13, 12)]
    assert scales == expected
    assert int(next(iter(updater._optimizer.state.values()))["step"]) == 3


def test_resuming_with_scales_equals_never_having_stopped():
    whole = make(Scaled)
    whole.planted = whole.netD, float("inf")
    whole.step(real())
    whole.planted = None
    state = copy.deepcopy(whole.state_dict())
    resumed = make(Scaled)
    resumed.load_state_dict(state)
    assert scale(resumed, "scale_d") == 2.0**15
    for engine in (whole, resumed):
        for i in range(3):
            engine.step(real(seed=i + 1))
    assert same(whole.netG.state_dict(), resumed.netG.state_dict())
    assert whole.state_dict()["scale_d"] == resumed.state_dict()["scale_d"]


def test_a_state_goes_from_one_precision_to_another():
    scaled, plain = make(Scaled), make()
    for engine in (scaled, plain):
        engine.step(real())
    plain.load_state_dict(scaled.state_dict())
    fresh = make(Scaled)
    fresh.load_state_dict(plain.state_dict())
    assert scale(fresh, "scale_d") == 2.0**16


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_weights_than_float32_are_refused(precision, dtype):
    netD = nn.Linear(2, 1).to(dtype)
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(InputError, match=rf"netD.weight is {name}; give netD.float\(\)"):
        Precision(precision, torch.device("cuda"), netG=nn.Linear(2, 1), netD=netD)


def test_a_cpu_without_bf16_is_said_once(monkeypatch, caplog):
    monkeypatch.setattr(saying, "_said", set())
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": False})
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            Precision("bf16", CPU)
    (record,) = caplog.records
    assert "no instructions for it" in record.getMessage()
    monkeypatch.setattr(saying, "_said", set())
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    Precision("bf16", CPU)
    assert len(caplog.records) == 1


def test_tf32_is_for_the_step_alone(caplog):
    convolutions, products = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    before = convolutions.fp32_precision, products.fp32_precision
    with Precision("tf32", torch.device("cuda")).products():
        assert (convolutions.fp32_precision, products.fp32_precision) == ("tf32", "tf32")
    assert (convolutions.fp32_precision, products.fp32_precision) == before
    with Precision("fp32", CPU).products():
        assert (convolutions.fp32_precision, products.fp32_precision) == before


def test_tf32_on_the_cpu_is_float32():
    engines = make(precision="tf32"), make()
    for engine in engines:
        engine.step(real())
    assert same(engines[0].netG.state_dict(), engines[1].netG.state_dict())


def test_a_run_in_bf16_resumes_to_the_bit():
    images = np.random.default_rng(0).integers(0, 256, (20, SIZE, SIZE, 1), dtype=np.uint8)
    data = ImageSet(images, None, (), "test", "digest")

    def start():
        engine = make(precision="bf16", ema=0.9)
        engine.attach(Loader(data, 8, flip=True))
        return engine

    whole = start()
    for _ in range(2):
        whole.step()
    resumed = start()
    resumed.load_state_dict(copy.deepcopy(whole.state_dict()))
    for engine in (whole, resumed):
        for _ in range(3):
            engine.step()
    assert same(whole.netG.state_dict(), resumed.netG.state_dict())
