"""The engine against a transcription of the example's loop, in float64; backends among them."""

import copy

import pytest
import torch
from fastgan.benchmarks import example_dcgan as example
from support import training_parity
from support.numerics import CUDA, GPU_DEVICE, TRITON, error

from fastgan import DCGANDiscriminator, DCGANGenerator, Engine, load_images

STEPS = 20
NZ, NGF, NDF = 12, 6, 6


def run_example(netG, netD, batches):
    trainer = example.ExampleTrainer(netG, netD)
    return [trainer.step(real, z) for real, z in batches]


def relative_error(got, want):
    got, want = (torch.as_tensor(v, dtype=torch.float64) for v in (got, want))
    return ((got - want).abs().max() / want.abs().max().clamp_min(1e-300)).item()


@pytest.fixture(scope="module")
def truth():
    """The example's networks and numbers, computed once for both ways of the engine."""
    cache = {}

    def compute(size, nc, batch):
        if (size, nc, batch) not in cache:
            torch.manual_seed(size + 10 * nc + batch)
            netG = example.Generator(NZ, NGF, nc, size).double()
            netD = example.Discriminator(NDF, nc, size).double()
            netG.apply(example.weights_init)
            netD.apply(example.weights_init)
            start = copy.deepcopy((netG.state_dict(), netD.state_dict()))
            batches = [
                (
                    torch.rand(batch, nc, size, size, dtype=torch.float64) * 2 - 1,
                    torch.randn(batch, NZ, 1, 1, dtype=torch.float64),
                )
                for _ in range(STEPS)
            ]
            numbers = run_example(netG, netD, batches)
            cache[size, nc, batch] = start, batches, netG, netD, numbers
        return cache[size, nc, batch]

    return compute


@pytest.mark.parametrize("fuse_passes", [False, "auto"])
@pytest.mark.parametrize("batch", [1, 7, 64])
@pytest.mark.parametrize("nc", [1, 3])
@pytest.mark.parametrize("size", [28, 32, 64])
def test_twenty_steps_equal_the_example(truth, size, nc, batch, fuse_passes):
    (start_g, start_d), batches, want_g, want_d, numbers = truth(size, nc, batch)
    netG = DCGANGenerator(NZ, NGF, nc, size).double()
    netD = DCGANDiscriminator(NDF, nc, size).double()
    netG.load_state_dict(start_g)
    netD.load_state_dict(start_d)
    engine = Engine(netG, netD, fuse_passes=fuse_passes, device="cpu")
    for (real, z), want in zip(batches, numbers, strict=True):
        got = engine.step(real, noise=z)
        values = (got.loss_d, got.loss_g, got.d_real, got.d_fake, got.d_fake_g)
        for name, g, w in zip(got._fields, values, want, strict=True):
            assert relative_error(g, w) < 1e-9, name
    for got, want in ((netG, want_g), (netD, want_d)):
        assert got.state_dict().keys() == want.state_dict().keys()
        for key, value in want.state_dict().items():
            assert relative_error(got.state_dict()[key], value) < 1e-9, key


@pytest.mark.parametrize("fuse_passes", [False, "auto", True])
def test_the_examples_own_networks(truth, fuse_passes):
    """D ends in a Sigmoid that the engine finds and leaves out."""
    (start_g, start_d), batches, want_g, want_d, _ = truth(32, 3, 7)
    netG = example.Generator(NZ, NGF, 3, 32).double()
    netD = example.Discriminator(NDF, 3, 32).double()
    netG.load_state_dict(start_g)
    netD.load_state_dict(start_d)
    if fuse_passes is True:
        netD = torch.nn.Sequential(netD.main, torch.nn.Flatten(0))
    engine = Engine(netG, netD, noise=(NZ, 1, 1), fuse_passes=fuse_passes, device="cpu")
    for real, z in batches:
        engine.step(real, noise=z)
    for got, want in ((netG, want_g), (netD, want_d)):
        for g, w in zip(got.state_dict().values(), want.state_dict().values(), strict=True):
            assert relative_error(g, w) < 1e-9


@pytest.mark.parametrize(("subject", "size"), [("cpp", 64), ("bf16", 32)])
def test_training_tracks_the_references(subject, size):
    """Loss curves of 200 steps on images, by the yardstick of support/training_parity.py."""
    digits = load_images("digits", image_size=size)
    found = training_parity.measure(subject, digits, size=size, channels=8, batch=8, steps=200)
    assert found.within, found


@pytest.mark.parametrize("backend", [TRITON, CUDA])
@pytest.mark.parametrize("fuse_passes", [False, "auto"])
@pytest.mark.parametrize(("channels", "nc"), [(4, 1), (8, 3)])
def test_kernels_for_gpus_step_as_the_reference_does(
    nan_outputs, honest_triton, backend, channels, nc, fuse_passes
):
    """Two steps in float32 against the reference's in float64: a few roundings each."""
    start = DCGANGenerator(6, channels, nc, 16), DCGANDiscriminator(channels, nc, 16)
    batches = [(torch.rand(3, nc, 16, 16) * 2 - 1, torch.randn(3, 6, 1, 1)) for _ in range(2)]

    def run(backend, dtype, device):
        networks = [copy.deepcopy(network).to(device, dtype) for network in start]
        engine = Engine(*networks, backend=backend, fuse_passes=fuse_passes, device=device)
        numbers = [
            engine.step(real.to(device, dtype), noise=z.to(device, dtype)) for real, z in batches
        ]
        found = {f"{name} {i}": value for i, s in enumerate(numbers) for name, value in vars_of(s)}
        for network in networks:
            found |= {f"{type(network).__name__} {k}": v for k, v in network.state_dict().items()}
        return {name: torch.as_tensor(value).cpu() for name, value in found.items()}

    want = run("reference", torch.float64, "cpu")
    got = run(backend, torch.float32, GPU_DEVICE)
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert error(got[name], value.double()) < 2e-6, name


def vars_of(numbers):
    return zip(numbers._fields, numbers, strict=True)
