"""The engine's losses, regularisers and classes, against each paper's formula in float64."""

import logging
import math

import pytest
import torch
import torch.nn.functional as F
from support.numerics import needs_kernels
from torch import nn

from fastgan import Engine
from fastgan.engine.losses import LOSSES
from fastgan.engine.regularisers import DiffAugment, add_noise, gradient_penalty, r1_penalty
from fastgan.errors import InputError
from fastgan.nn.conditional import ConditionalGenerator, LabelPlanes, Projection
from fastgan.nn.dcgan import DCGANDiscriminator, DCGANGenerator

NZ, SIZE, N = 5, 16, 6


def networks(dtype=torch.float64, norm=True):
    torch.manual_seed(0)
    netG = DCGANGenerator(NZ, 4, 1, SIZE)
    netD = DCGANDiscriminator(4, 1, SIZE, **({} if norm else {"norm": "none"}))
    return netG.to(dtype), netD.to(dtype)


def batch(n=N, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    real = torch.rand(n, 1, SIZE, SIZE, generator=g, dtype=torch.float64) * 2 - 1
    return real.to(dtype), torch.randn(n, NZ, 1, 1, generator=g, dtype=torch.float64).to(dtype)


def log_d(logit):
    """log D(x), as the papers' formulas have it."""
    return torch.log(1 / (1 + torch.exp(-logit)))


# D's loss on its logits of real images and samples, and G's on those of samples.
FORMULAS = {
    "bce": (lambda r, f: -log_d(r).mean() - log_d(-f).mean(), lambda f: -log_d(f).mean()),
    "minimax": (lambda r, f: -log_d(r).mean() - log_d(-f).mean(), lambda f: log_d(-f).mean()),
    "lsgan": (
        lambda r, f: ((r - 1) ** 2).mean() / 2 + (f**2).mean() / 2,
        lambda f: ((f - 1) ** 2).mean() / 2,
    ),
    "hinge": (
        lambda r, f: F.relu(1 - r).mean() + F.relu(1 + f).mean(),
        lambda f: -f.mean(),
    ),
    "wgan-gp": (lambda r, f: f.mean() - r.mean(), lambda f: -f.mean()),
}


def updated(engine_settings, d_loss, g_loss, norm=True):
    """Weights after one step by SGD: the engine's, and those of the formula written out."""
    real, z = batch()
    rates = {"lr": 0.1}
    netG, netD = networks(norm=norm)
    opts = {"opt_g": torch.optim.SGD(netG.parameters(), **rates)}
    opts["opt_d"] = torch.optim.SGD(netD.parameters(), **rates)
    engine = Engine(netG, netD, device="cpu", d_output="logits", **opts, **engine_settings)
    stats = engine.step(real, noise=z).to_dict()

    netG, netD = networks(norm=norm)
    fake = netG(z)
    of_d = d_loss(netD, real, fake.detach())
    grads = torch.autograd.grad(of_d, list(netD.parameters()))
    with torch.no_grad():
        for p, g in zip(netD.parameters(), grads, strict=True):
            p -= rates["lr"] * g
    of_g = g_loss(netD(fake))
    grads = torch.autograd.grad(of_g, list(netG.parameters()))
    with torch.no_grad():
        for p, g in zip(netG.parameters(), grads, strict=True):
            p -= rates["lr"] * g
    return engine, stats, (netG, netD), of_g.item()


def assert_same(engine, wanted, tol=1e-9):
    for mine, theirs in zip((engine.netG, engine.netD), wanted, strict=True):
        for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=tol, atol=tol)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_step_is_the_papers_formula(loss):
    of_d, of_g = FORMULAS[loss]
    engine, stats, wanted, loss_g = updated(
        {"loss": loss, "gp": 0.0}, lambda d, real, fake: of_d(d(real), d(fake)), of_g
    )
    assert_same(engine, wanted)
    assert stats["loss_g"] == pytest.approx(loss_g, rel=1e-9)


@pytest.mark.parametrize("loss", ["bce", "lsgan"])
def test_one_sided_label_smoothing(loss):
    def smoothed(netD, real, fake):
        r, f = netD(real), netD(fake)
        if loss == "lsgan":
            return ((r - 0.9) ** 2).mean() / 2 + (f**2).mean() / 2
        return -(0.9 * log_d(r) + 0.1 * log_d(-r)).mean() - log_d(-f).mean()

    engine, _, wanted, _ = updated(
        {"loss": loss, "label_smoothing": 0.1}, smoothed, FORMULAS[loss][1]
    )
    assert_same(engine, wanted)


def test_r1_is_lazy_and_its_weight_made_up_for(caplog):
    """Mescheder et al. 2018: gamma/2 E |grad D(x)|^2, at one update in ``r1_every``, times it."""

    def penalised(netD, real, fake):
        real = real.clone().requires_grad_()
        scores = netD(real)
        (g,) = torch.autograd.grad(scores.sum(), real, create_graph=True)
        penalty = 3.0 / 2 * (g.flatten(1) ** 2).sum(1).mean()
        return FORMULAS["bce"][0](scores, netD(fake)) + 4 * penalty

    engine, _, wanted, _ = updated({"r1": 3.0, "r1_every": 4}, penalised, FORMULAS["bce"][1])
    assert_same(engine, wanted)
    real, z = batch(seed=1)
    before = [p.detach().clone() for p in engine.netD.parameters()]
    engine.step(real, noise=z)
    plain = Engine(*networks(), device="cpu", opt_d=None, d_output="logits")
    for p, value in zip(plain.netD.parameters(), before, strict=True):
        p.data.copy_(value)
    plain.netG.load_state_dict(wanted[0].state_dict())
    plain.opt_d = torch.optim.SGD(plain.netD.parameters(), lr=0.1)
    plain._update_by_d._optimizer = plain.opt_d
    plain.step(real, noise=z)
    for a, b in zip(engine.netD.parameters(), plain.netD.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_the_gradient_penalty_of_wgan():
    """Gulrajani et al. 2017, equation 3, at the points that the engine's generator draws."""

    def penalised(netD, real, fake):
        draw = Engine(*networks(norm=False), device="cpu", d_output="logits").generator
        e = torch.rand(N, 1, 1, 1, generator=draw).double()
        x = (real * (1 - e) + fake * e).requires_grad_()
        (g,) = torch.autograd.grad(netD(x).sum(), x, create_graph=True)
        penalty = ((g.flatten(1).norm(dim=1) - 1) ** 2).mean()
        return FORMULAS["wgan-gp"][0](netD(real), netD(fake)) + 10 * penalty

    engine, _, wanted, _ = updated(
        {"loss": "wgan-gp"}, penalised, FORMULAS["wgan-gp"][1], norm=False
    )
    assert_same(engine, wanted, tol=1e-8)


@needs_kernels
@pytest.mark.parametrize("settings", [{"loss": "wgan-gp"}, {"r1": 5.0, "r1_every": 1}])
def test_penalties_through_fused_blocks_have_the_references_gradients(settings, caplog):
    """And it is said once that the penalised passes run as plain PyTorch."""
    real, z = batch(dtype=torch.float32)
    caplog.set_level(logging.WARNING, "fastgan")
    gradients = {}
    for backend in ("cpp", "reference"):
        engine = Engine(
            *networks(torch.float32, norm="r1" in settings),
            **{"device": "cpu", "backend": backend, "d_output": "logits", **settings},
        )
        for _ in range(2):
            engine.step(real, noise=z)
        gradients[backend] = torch.cat([p.grad.flatten() for p in engine.netD.parameters()])
    difference = gradients["cpp"] - gradients["reference"]
    assert difference.norm() <= 1e-3 * gradients["reference"].norm()
    assert sum("differentiated twice" in r.message for r in caplog.records) <= 1


def test_penalties_by_hand():
    """Of D(x) = a·x + |x|^2 / 2 the gradient is a + x."""
    a = torch.randn(1, 2, 3, 3, dtype=torch.float64)
    x = torch.randn(4, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    y = torch.randn(4, 2, 3, 3, dtype=torch.float64)

    def score(v):
        return (a * v + v**2 / 2).flatten(1).sum(1)

    want = ((a + x) ** 2).flatten(1).sum(1).mean() / 2
    torch.testing.assert_close(r1_penalty(score(x), x), want)
    got = gradient_penalty(score, x.detach(), y, torch.Generator().manual_seed(3))
    e = torch.rand(4, 1, 1, 1, generator=torch.Generator().manual_seed(3)).double()
    points = x.detach() * (1 - e) + y * e
    want = (((a + points).flatten(1).norm(dim=1) - 1) ** 2).mean()
    torch.testing.assert_close(got, want)


class TestDiffAugment:
    def images(self, n=64, c=3, side=16):
        return torch.rand(n, c, side, side, dtype=torch.float64) * 2 - 1

    def draw(self, seed=0):
        return torch.Generator().manual_seed(seed)

    def test_translation_is_by_up_to_an_eighth_and_fills_with_zeros(self):
        x = self.images(side=16)
        y = DiffAugment(["translation"])(x, self.draw())
        found = set()
        for before, after in zip(x, y, strict=True):
            shifts = [
                (dy, dx)
                for dy in range(-3, 4)
                for dx in range(-3, 4)
                if torch.equal(after, self.shifted(before, dy, dx))
            ]
            assert len(shifts) == 1
            found.add(shifts[0])
        rows, columns = zip(*found, strict=True)
        assert set(rows) == set(columns) == {-2, -1, 0, 1, 2}

    @staticmethod
    def shifted(x, dy, dx):
        """``y[r, c] = x[r + dy, c + dx]``, zero outside."""
        padded = F.pad(x, (4, 4, 4, 4))
        h, w = x.shape[1:]
        return padded[:, 4 + dy : 4 + dy + h, 4 + dx : 4 + dx + w]

    def test_cutout_is_a_square_of_half_the_side(self):
        x = self.images(200).abs() + 0.1
        cut = (DiffAugment(["cutout"])(x, self.draw()) == 0).all(dim=1)
        for mask in cut:
            rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
            assert mask.sum() == len(rows) * len(columns)
            assert 4 <= len(rows) <= 8 and 4 <= len(columns) <= 8
        assert (cut.sum((1, 2)) == 64).any() and cut.any(0).all()

    def test_color_keeps_what_it_should(self):
        """Brightness adds within 0.5; saturation and contrast are of 0..2 and 0.5..1.5."""
        x = self.images(500, side=4)
        y = DiffAugment(["color"])(x, self.draw())
        shift = (y - x).mean((1, 2, 3))
        assert shift.abs().max() <= 0.5 and shift.std() == pytest.approx(1 / math.sqrt(12), rel=0.1)
        contrast = y.mean(1).std((1, 2)) / x.mean(1).std((1, 2))
        assert contrast.min() >= 0.5 and contrast.max() <= 1.5 and contrast.std() > 0.2

    def test_gradients_pass_through(self):
        x = self.images(3, side=8).requires_grad_()
        augment = DiffAugment(["color", "translation", "cutout"])
        assert torch.autograd.gradcheck(lambda v: augment(v, self.draw()), x)
        assert torch.autograd.gradgradcheck(lambda v: augment(v, self.draw()), x)

    def test_layout_and_dtype_are_kept(self):
        x = self.images(2).float().contiguous(memory_format=torch.channels_last)
        y = DiffAugment(["color", "translation", "cutout"])(x, self.draw())
        assert y.dtype == x.dtype and y.is_contiguous(memory_format=torch.channels_last)


def test_instance_noise_has_its_deviation():
    x = torch.zeros(100, 1, 16, 16)
    noise = add_noise(x, torch.tensor(0.3), torch.Generator().manual_seed(0))
    assert noise.std().item() == pytest.approx(0.3, rel=0.02)


def test_d_and_g_see_what_is_augmented_and_noisy():
    """D that returns the mean of the squares of what it sees."""
    seen = []

    class Watching(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, x):
            seen.append(x.detach())
            return self.weight * x.square().flatten(1).mean(1)

    netG, _ = networks(torch.float32)
    engine = Engine(netG, Watching(), device="cpu", d_output="logits", instance_noise=0.5)
    real, z = batch(dtype=torch.float32)
    seen.clear()
    engine.step(real, noise=z)
    of_real, of_fake, of_g = seen[-3:]
    assert (of_real - real).std().item() == pytest.approx(0.5, rel=0.1)
    assert (of_g - of_fake).std().item() == pytest.approx(0.5 * math.sqrt(2), rel=0.1)
    engine.set_instance_noise(0.0)
    engine.step(real, noise=z)
    assert torch.equal(seen[-3], real)


class TestConditional:
    CLASSES = 3

    def make(self, how, **settings):
        torch.manual_seed(0)
        netG = ConditionalGenerator(DCGANGenerator(NZ + 3, 4, 1, SIZE), self.CLASSES, NZ, 3)
        if how == "planes":
            netD = LabelPlanes(DCGANDiscriminator(4, 2, SIZE), self.CLASSES, SIZE)
        else:
            netD = Projection(DCGANDiscriminator(4, 1, SIZE), self.CLASSES)
        return Engine(netG, netD, device="cpu", **settings)

    @pytest.mark.parametrize("how", ["planes", "projection"])
    def test_one_pass_is_two(self, how):
        real, z = batch(dtype=torch.float32)
        labels = torch.arange(N) % self.CLASSES
        engines = [self.make(how, fuse_passes=fuse, backend="reference") for fuse in (True, False)]
        for engine in engines:
            for _ in range(3):
                engine.step(real, labels, z, (labels + 1) % self.CLASSES)
        for net in ("netG", "netD"):
            a, b = (getattr(engine, net).state_dict() for engine in engines)
            for key in a:
                torch.testing.assert_close(a[key], b[key], rtol=1e-3, atol=2e-5, msg=key)

    def test_labels_are_needed_and_checked(self):
        engine = self.make("planes")
        real, z = batch(dtype=torch.float32)
        with pytest.raises(InputError, match="labels: netG is conditional, of 3 classes"):
            engine.step(real)
        with pytest.raises(InputError, match=r"labels is float32 \[6\]; 6 images need int64"):
            engine.step(real, torch.zeros(N))
        with pytest.raises(InputError, match="classes from 0 to 5; netG has 3"):
            engine.step(real, torch.arange(N))
        engine.step(real, torch.arange(N) % 3, z)

    def test_samples_of_a_class(self):
        engine = self.make("projection", ema=0.9)
        real, z = batch(dtype=torch.float32)
        engine.step(real, torch.arange(N) % 3, z)
        engine.g_step(n=4)
        zeros = torch.zeros(N, dtype=torch.int64)
        samples = engine.sample(N, z, labels=zeros)
        assert not torch.allclose(samples, engine.sample(N, z, labels=zeros + 1))
        assert not torch.equal(engine.sample(3), engine.sample(3))
        assert torch.equal(engine.sample(3, z[:3]), engine.sample(3, z[:3], labels=torch.arange(3)))

    def test_other_classes_in_d_are_refused(self):
        netG = ConditionalGenerator(DCGANGenerator(NZ + 3, 4, 1, SIZE), 3, NZ, 3)
        netD = Projection(DCGANDiscriminator(4, 1, SIZE), 4)
        with pytest.raises(InputError, match="n_classes=4, but netG's is 3"):
            Engine(netG, netD, device="cpu")
