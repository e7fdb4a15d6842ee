"""The engine: what its step does beyond parity, its state, and what it refuses."""

import copy
import logging

import numpy as np
import pytest
import torch
from fastgan.benchmarks import bench_engine
from fastgan.benchmarks import example_dcgan as example
from torch import nn

from fastgan import DCGANDiscriminator, DCGANGenerator, Engine, ImageSet, Loader
from fastgan.engine.adam import Adam
from fastgan.engine.d_output import DiscriminatorOutput
from fastgan.errors import InputError, NotBuiltError
from fastgan.ops import cpp
from fastgan.ops.backend import machine_reasons

SIZE, NZ = 16, 6


def make(channels=4, **kwargs):
    torch.manual_seed(0)
    netG, netD = DCGANGenerator(NZ, channels, 1, SIZE), DCGANDiscriminator(channels, 1, SIZE)
    return Engine(netG, netD, device="cpu", **kwargs)


def real(n=8, seed=0):
    return torch.rand(n, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def image_set(n=20):
    images = np.random.default_rng(0).integers(0, 256, (n, SIZE, SIZE, 1), dtype=np.uint8)
    return ImageSet(images, None, (), "test", "digest")


def assert_same(a, b):
    assert bench_engine.differences(a, b) == []


def test_the_seed_alone_decides():
    def run(seed):
        engine = make(seed=seed)
        for i in range(3):
            engine.step(real(seed=i))
            torch.rand(i + 1)  # the global generator takes no part
        return engine.state_dict()

    assert_same(run(1), run(1))
    assert not torch.equal(run(1)["netG"]["main.0.weight"], run(2)["netG"]["main.0.weight"])


def test_the_global_generator_is_left_alone():
    engine = make(ema=0.9)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    engine.step(real())
    engine.sample(3)
    assert torch.equal(torch.get_rng_state(), before)


def test_sampling_does_not_change_training():
    plain, watched = make(ema=0.9), make(ema=0.9)
    for i in range(3):
        plain.step(real(seed=i))
        watched.step(real(seed=i))
        watched.sample(5)
        watched.sample(5, ema=False)
    assert watched.netG.training
    want, got = plain.state_dict(), watched.state_dict()
    for of_sampling in ("sample_generator", "choices"):
        want.pop(of_sampling), got.pop(of_sampling)
    assert_same(want, got)


@pytest.mark.parametrize("ema", [0.0, 0.9])
@pytest.mark.parametrize("n_d", [1, 2])
def test_resuming_equals_never_having_stopped(ema, n_d):
    def fresh():
        engine = make(ema=ema, n_d=n_d, seed=3)
        engine.attach(Loader(image_set(), 8, seed=3, flip=True))
        return engine

    whole = fresh()
    for _ in range(7):
        whole.step()
    first = fresh()
    for _ in range(4):
        first.step()
    state = copy.deepcopy(first.state_dict())
    second = fresh()
    second.load_state_dict(state)
    for _ in range(3):
        second.step()
    assert second.steps == 7
    assert_same(whole.state_dict(), second.state_dict())


def test_n_d_discriminator_steps_and_one_generator_step():
    engine, by_hand = make(n_d=3, seed=1), make(seed=1)
    images, z = real(12), torch.randn(12, NZ, 1, 1)
    engine.step(images, noise=z)
    for batch, noise in zip(images.chunk(3)[:2], z.chunk(3)[:2], strict=True):
        by_hand.d_step(batch, noise=noise)
    by_hand.step(images.chunk(3)[2], noise=z.chunk(3)[2])
    assert_same(engine.netD.state_dict(), by_hand.netD.state_dict())
    assert_same(engine.netG.state_dict(), by_hand.netG.state_dict())


def test_d_step_and_g_step_change_only_their_network():
    engine = make()
    g, d = copy.deepcopy(dict(engine.netG.named_parameters())), dict(engine.netD.named_parameters())
    d = copy.deepcopy(d)
    stats = engine.d_step(real())
    assert stats._fields == ("loss_d", "d_real", "d_fake")
    assert_same(g, dict(engine.netG.named_parameters()))
    assert not torch.equal(d["main.0.weight"], engine.netD.main[0].weight)
    d = copy.deepcopy(dict(engine.netD.named_parameters()))
    stats = engine.g_step(n=4)
    assert stats._fields == ("loss_g", "d_fake_g")
    assert_same(d, dict(engine.netD.named_parameters()))
    assert not torch.equal(g["main.0.weight"], engine.netG.main[0].weight)


def test_d_gets_no_gradient_in_gs_update():
    engine = make()
    engine.d_step(real())
    engine.netD.zero_grad()
    engine.g_step(n=4)
    assert all(p.grad is None for p in engine.netD.parameters())
    assert all(p.requires_grad for p in engine.netD.parameters())


def test_frozen_parameters_of_d_stay_frozen():
    engine = make()
    engine.netD.main[0].weight.requires_grad_(False)
    engine.step(real())
    assert not engine.netD.main[0].weight.requires_grad


def test_every_update_passes_the_gradient_seam():
    seen = []

    class Watched(Engine):
        def reduce_gradients(self, params):
            params = list(params)
            assert all(p.grad is not None for p in params)
            seen.append([id(p) for p in params])

    netG, netD = DCGANGenerator(NZ, 4, 1, SIZE), DCGANDiscriminator(4, 1, SIZE)
    Watched(netG, netD, device="cpu", n_d=2).step(real(8))
    d, g = ([id(p) for p in net.parameters()] for net in (netD, netG))
    assert seen == [d, d, g]


def test_users_optimisers_are_taken_as_they_are():
    netG, netD = DCGANGenerator(NZ, 4, 1, SIZE), DCGANDiscriminator(4, 1, SIZE)
    opt_g = torch.optim.SGD(netG.parameters(), lr=0.5)
    opt_d = torch.optim.RMSprop(netD.parameters(), lr=0.1)
    engine = Engine(netG, netD, opt_g=opt_g, opt_d=opt_d, device="cpu")
    assert engine.opt_g is opt_g and engine.opt_d is opt_d
    before = netG.main[0].weight.detach().clone()
    engine.step(real())
    torch.testing.assert_close(netG.main[0].weight, before - 0.5 * netG.main[0].weight.grad)


def test_learning_rates():
    engine = make(lr=1e-3, lr_d=4e-3)
    assert engine.opt_g.param_groups[0]["lr"].item() == pytest.approx(1e-3)
    assert engine.opt_d.param_groups[0]["lr"].item() == pytest.approx(4e-3)


def test_a_loaded_learning_rate_stays_where_it_was():
    saved, engine = make(lr=1e-3).state_dict(), make(lr=5e-3)
    rate = engine.opt_g.param_groups[0]["lr"]
    engine.load_state_dict(copy.deepcopy(saved))
    assert engine.opt_g.param_groups[0]["lr"] is rate
    assert rate.item() == pytest.approx(1e-3)


def test_ema_is_the_average_of_the_parameters():
    engine = make(ema=0.75)
    want = {k: v.detach().clone() for k, v in engine.netG.named_parameters()}
    for i in range(40):
        engine.step(real(seed=i))
        decay = min(0.75, (i + 1) / (i + 10))
        for key, value in engine.netG.named_parameters():
            want[key].mul_(decay).add_(value.detach(), alpha=1 - decay)
    for key, value in engine.ema_module.named_parameters():
        torch.testing.assert_close(value, want[key], rtol=1e-5, atol=1e-7)
        assert not value.requires_grad


def test_emas_statistics_are_those_of_its_own_activations():
    engine = make(ema=0.9)
    for i in range(5):
        engine.step(real(seed=i))
    averaged = engine.ema_module
    z = torch.randn(4096, NZ, 1, 1, generator=torch.Generator().manual_seed(9))
    hidden = averaged.main[0](z)
    torch.testing.assert_close(
        averaged.main[1].running_mean, hidden.mean((0, 2, 3)), rtol=0, atol=0.02
    )
    torch.testing.assert_close(
        averaged.main[1].running_var, hidden.var((0, 2, 3)), rtol=0.2, atol=0
    )


def test_uint8_and_float_images_are_the_same_images():
    bytes_ = torch.randint(0, 256, (4, SIZE, SIZE, 1), dtype=torch.uint8)
    results = []
    for batch in (
        bytes_,
        bytes_.permute(0, 3, 1, 2),
        bytes_.permute(0, 3, 1, 2).float() / 127.5 - 1,
        bytes_.permute(0, 3, 1, 2).double() / 127.5 - 1,
    ):
        engine = make()
        engine.step(batch)
        results.append(engine.netD.main[0].weight.detach().clone())
    for other in results[1:]:
        torch.testing.assert_close(other, results[0])


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (torch.zeros(4, 1, 32, 32), r"float32 \[4, 1, 32, 32\].*\[N, 1, 16, 16\]"),
        (torch.zeros(4, 3, SIZE, SIZE), r"\[4, 3, 16, 16\]"),
        (torch.zeros(4, SIZE, SIZE, 1), r"floating \[N, 1, 16, 16\]"),
        (torch.zeros(4, 1, SIZE, SIZE, dtype=torch.int64), "int64"),
        (torch.zeros(4, 1, SIZE, SIZE, dtype=torch.bool), "bool"),
        (torch.zeros(0, 1, SIZE, SIZE), "batch of 0"),
        (torch.zeros(4, SIZE * SIZE), r"\[4, 256\]"),
        (torch.full((4, 1, SIZE, SIZE), 255.0), "from 255 to 255"),
        (torch.full((4, 1, SIZE, SIZE), -1.5), "from -1.5"),
        (torch.full((4, 1, SIZE, SIZE), float("nan")), "nan"),
    ],
)
def test_a_wrong_first_batch_is_refused_and_changes_nothing(batch, message):
    engine = make()
    before = copy.deepcopy(engine.state_dict())
    with pytest.raises(InputError, match=message):
        engine.step(batch)
    assert_same(before, engine.state_dict())


def test_the_range_is_looked_at_in_the_first_batch_even_after_a_g_step():
    engine = make()
    engine.g_step(n=2)
    with pytest.raises(InputError, match="255"):
        engine.step(torch.full((4, 1, SIZE, SIZE), 255.0))


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"label_smoothing": 0.5}, InputError, "label_smoothing=0.5"),
        ({"loss": "hinge", "label_smoothing": 0.1}, InputError, "loss='hinge' has no target"),
        ({"r1": -1.0}, InputError, "r1=-1.0"),
        ({"r1_every": 0}, InputError, "r1_every=0"),
        ({"gp": float("inf")}, InputError, "gp=inf"),
        ({"instance_noise": -0.1}, InputError, "instance_noise=-0.1"),
        ({"diff_augment": ["blur"]}, InputError, "diff_augment='blur' is unknown; .* cutout"),
        ({"loss": "mse"}, InputError, "loss='mse' is unknown"),
        ({"precision": "fp8"}, InputError, "precision='fp8' is unknown"),
        ({"precision": "fp16"}, InputError, "precision='fp16' needs a GPU; .* 'bf16' or 'fp32'"),
        (
            {"capture": True},
            InputError,
            "capture=True: CUDA graphs are of GPUs, and the step is on cpu; use 'auto'",
        ),
        ({"capture": "yes"}, InputError, "capture='yes'"),
        ({"backend": "cuda"}, NotBuiltError, "backend='cuda'"),
        ({"d_output": "sigmoid"}, InputError, "d_output='sigmoid'"),
        ({"fuse_passes": 1}, InputError, "fuse_passes=1"),
        ({"n_d": 0}, InputError, "n_d=0"),
        ({"ema": 1.0}, InputError, "ema=1.0"),
        ({"lr": 0.0}, InputError, "lr=0.0"),
        ({"lr_d": float("nan")}, InputError, "lr_d=nan"),
        ({"betas": (1.0, 0.9)}, InputError, r"betas=\(1.0, 0.9\)"),
        ({"noise": (0,)}, InputError, r"noise=\(0,\)"),
    ],
)
def test_arguments_out_of_range(without_cuda, kwargs, error, message):
    with pytest.raises(error, match=message):
        make(**kwargs)


@pytest.mark.parametrize("device", ["tpu9", "meta", "cuda:99"])
def test_an_unknown_device(device):
    with pytest.raises(InputError, match=f"device='{device}'"):
        Engine(DCGANGenerator(NZ, 4), DCGANDiscriminator(4), device=device)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda e: e.step(), InputError, "no loader is attached"),
        (lambda e: e.step(real(), labels=torch.zeros(8)), InputError, "labels: .* take no labels"),
        (lambda e: e.step(real(), fake_labels=torch.zeros(8)), InputError, "fake_labels: netG"),
        (lambda e: e.step(real(8), noise=torch.randn(7, NZ, 1, 1)), InputError, "7 rows"),
        (lambda e: e.g_step(), InputError, "neither"),
        (lambda e: e.g_step(2, torch.randn(2, NZ)), InputError, "both"),
        (lambda e: e.g_step(0), InputError, "n=0"),
        (lambda e: e.sample(0), InputError, "n=0"),
        (lambda e: e.sample(3, torch.randn(2, NZ)), InputError, "2 rows"),
    ],
)
def test_calls_that_are_refused(call, error, message):
    engine = make()
    with pytest.raises(error, match=message):
        call(engine)


def test_a_batch_that_n_d_does_not_divide():
    with pytest.raises(InputError, match=r"batch of 8 .*n_d=3"):
        make(n_d=3).step(real(8))


def test_state_of_an_engine_with_other_parts():
    with pytest.raises(InputError, match="without ema, this engine has one"):
        make(ema=0.5).load_state_dict(make().state_dict())


def test_a_generator_without_nz_asks_for_noise():
    netG = nn.Sequential(nn.ConvTranspose2d(NZ, 1, SIZE))
    with pytest.raises(InputError, match=r"noise=None.*nz"):
        Engine(netG, DCGANDiscriminator(4, 1, SIZE), device="cpu")


@pytest.mark.parametrize(
    "noise",
    [
        (NZ, 1, 1),
        [NZ, 1, 1],
        lambda n, generator: torch.rand(n, NZ, 1, 1, generator=generator),
    ],
)
def test_noise_by_shape_or_function(noise):
    netG = nn.Sequential(nn.ConvTranspose2d(NZ, 1, SIZE), nn.Tanh())
    engine = Engine(netG, DCGANDiscriminator(4, 1, SIZE), noise=noise, device="cpu")
    engine.step(real())
    assert engine.sample(3).shape == (3, 1, SIZE, SIZE)


class MLPGenerator(nn.Module):
    nz = NZ

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(NZ, SIZE * SIZE)

    def forward(self, z):
        return self.linear(z).tanh().view(-1, 1, SIZE, SIZE)


def test_an_mlps_noise_is_a_vector():
    netD = nn.Sequential(nn.Flatten(), nn.Linear(SIZE * SIZE, 1))
    engine = Engine(MLPGenerator(), netD, device="cpu")
    engine.step(real())
    assert engine.sample(2).shape == (2, 1, SIZE, SIZE)


def test_networks_that_do_not_fit_are_named():
    with pytest.raises(InputError, match=r"netD cannot take netG's images \[2, 1, 16, 16\]"):
        Engine(DCGANGenerator(NZ, 4, 1, 16), DCGANDiscriminator(4, 3, 16), device="cpu").step(
            real()
        )
    with pytest.raises(InputError, match=r"netD returned \[50\] for 2 images"):
        Engine(DCGANGenerator(NZ, 4, 1, 32), DCGANDiscriminator(4, 1, 16), device="cpu").g_step(2)
    with pytest.raises(InputError, match="netG cannot take noise"):
        Engine(DCGANGenerator(NZ, 4), DCGANDiscriminator(4), noise=(NZ + 1, 1, 1)).g_step(2)


def conv(*more):
    return nn.Sequential(nn.Conv2d(1, 4, 4, 4), nn.LeakyReLU(0.2), *more)


class Functional(nn.Module):
    """A body, and a last operation by function."""

    def __init__(self, last):
        super().__init__()
        self.body = conv(nn.Conv2d(4, 1, 4))
        self.last = last

    def forward(self, x):
        return self.last(self.body(x))


class Gated(nn.Module):
    """A sigmoid that is called, but not last."""

    def __init__(self):
        super().__init__()
        self.a, self.b = conv(nn.Conv2d(4, 1, 4)), conv(nn.Conv2d(4, 1, 4))

    def forward(self, x):
        out = self.a(x).sigmoid()
        self.b(x).sigmoid()
        return out


@pytest.mark.parametrize(
    "netD",
    [
        conv(nn.Conv2d(4, 1, 4)),
        conv(nn.Flatten(), nn.Linear(64, 1)),
        conv(nn.Conv2d(4, 1, 1)),  # a patch discriminator, [N, 1, 4, 4]
        Functional(lambda y: y.view(-1)),
        Functional(lambda y: y.mean((1, 2, 3))),
        Functional(lambda y: y + y),
        Functional(lambda y: y.sigmoid().logit().detach() + y),
        example.Discriminator(4, 1, SIZE).main[:-1],
    ],
)
def test_logits_are_recognised(netD):
    x = real(4)
    output = DiscriminatorOutput(netD, x)
    assert output.kind == "logits"
    with output.logits():
        scores = netD(x)
    assert torch.equal(scores, netD(x))


@pytest.mark.parametrize(
    "netD",
    [
        conv(nn.Conv2d(4, 1, 4), nn.Sigmoid()),
        conv(nn.Conv2d(4, 1, 4), nn.Sigmoid(), nn.Flatten(0)),
        Functional(torch.sigmoid),
        Functional(lambda y: y.sigmoid().squeeze()),
        Functional(lambda y: y.clone().sigmoid_()),
        conv(nn.Conv2d(4, 4, 1), nn.Sigmoid(), nn.Conv2d(4, 1, 4), nn.Sigmoid()),
        example.Discriminator(4, 1, SIZE),
    ],
)
@pytest.mark.parametrize("requested", ["auto", "probability"])
def test_a_final_sigmoid_is_left_out(netD, requested):
    x = real(4)
    output = DiscriminatorOutput(netD, x, requested)
    assert output.kind == "logits"
    with output.logits():
        logits = netD(x)
    assert torch.equal(logits.sigmoid(), netD(x))
    assert not torch.equal(logits, netD(x))


@pytest.mark.parametrize(
    "netD",
    [
        Gated(),
        Functional(lambda y: y.sigmoid().mean((1, 2, 3))),
        Functional(torch.tanh),
        Functional(lambda y: torch.clamp(y, 0, 1)),
        Functional(lambda y: y.detach()),
        Functional(lambda y: 1 / (1 + torch.exp(-y))),
    ],
)
def test_an_ambiguous_output_raises_and_asks(netD):
    with pytest.raises(InputError, match='d_output="logits" or d_output="probability"'):
        DiscriminatorOutput(netD, real(4))
    assert DiscriminatorOutput(netD, real(4), "logits").kind == "logits"


def test_a_probability_that_is_none_is_refused():
    netD = DCGANDiscriminator(4, 1, SIZE)
    with pytest.raises(InputError, match=r'd_output="probability".*pass d_output="logits"'):
        DiscriminatorOutput(netD, real(4), "probability")
    with pytest.raises(InputError, match="TanhBackward0"):
        DiscriminatorOutput(Functional(torch.tanh), real(4), "probability")
    squashed = Functional(lambda y: 1 / (1 + torch.exp(-y)))
    assert DiscriminatorOutput(squashed, real(4), "probability").kind == "probability"


class WithSigmoid(DCGANDiscriminator):
    def forward(self, x):
        return super().forward(x).sigmoid()


def test_a_sigmoid_put_on_fastgans_own_discriminator_is_found():
    appended = DCGANDiscriminator(4, 1, SIZE)
    appended.main.append(nn.Sigmoid())
    for netD in (WithSigmoid(4, 1, SIZE), appended):
        x = real(4)
        with DiscriminatorOutput(netD, x).logits():
            logits = netD(x)
        assert torch.equal(logits.sigmoid(), netD(x))


def test_a_state_from_another_kind_of_device_goes_on_with_other_numbers(caplog):
    engine, saved = make(seed=4), make(seed=4).state_dict()
    saved.update(device="cuda", generator=torch.zeros(16, dtype=torch.uint8))
    engine.load_state_dict(saved)
    assert "other random numbers" in caplog.text
    engine.step(real())


def test_two_engines_do_not_share_moments():
    first, second = make(), make()
    first.step(real())
    second.load_state_dict(first.state_dict())
    moment = first.opt_d.state_dict()["state"][0]["exp_avg"].clone()
    second.step(real())
    assert torch.equal(first.opt_d.state_dict()["state"][0]["exp_avg"], moment)


def test_averaging_a_generator_with_dropout_leaves_the_global_generator():
    netG = nn.Sequential(
        nn.ConvTranspose2d(NZ, 4, SIZE),
        nn.BatchNorm2d(4),
        nn.Dropout(),
        nn.Conv2d(4, 1, 1),
        nn.Tanh(),
    )
    engine = Engine(netG, DCGANDiscriminator(4, 1, SIZE), noise=(NZ, 1, 1), ema=0.9, device="cpu")
    engine.step(real())
    state = torch.get_rng_state()
    images = engine.sample(3)
    assert torch.equal(state, torch.get_rng_state())
    engine._ema._stale = True
    torch.rand(5)
    noise = torch.randn(3, NZ, 1, 1)
    first = engine.sample(3, noise)
    engine._ema._stale = True
    torch.rand(5)
    assert torch.equal(engine.sample(3, noise), first)
    assert not engine.ema_module.training and images.shape == (3, 1, SIZE, SIZE)


def test_a_generator_that_cannot_be_copied():
    netG = DCGANGenerator(NZ, 4, 1, SIZE)
    netG.kept = netG.main[0].weight * 1
    with pytest.raises(InputError, match=r"ema=0.5: netG cannot be copied"):
        Engine(netG, DCGANDiscriminator(4, 1, SIZE), ema=0.5, device="cpu")


def test_a_dataloader_is_not_attached():
    with pytest.raises(InputError, match="DataLoader has no next_batch"):
        make().attach(torch.utils.data.DataLoader([1, 2]))


def test_a_probability_that_cannot_be_undone_trains_as_in_the_example():
    def build():
        torch.manual_seed(1)
        netD = Functional(lambda y: (1 / (1 + torch.exp(-y))).view(-1)).double()
        return DCGANGenerator(NZ, 4, 1, SIZE).double(), netD

    netG, netD = build()
    engine = Engine(netG, netD, d_output="probability", device="cpu", fuse_passes=False)
    trainer = example.ExampleTrainer(*build())
    for i in range(3):
        z = torch.randn(4, NZ, 1, 1, dtype=torch.float64)
        got = engine.step(real(4, i).double(), noise=z).to_dict()
        want = trainer.step(real(4, i).double(), z)
        assert list(got.values()) == pytest.approx(
            [want[0], want[1], want[2], want[3], want[4]], rel=1e-9
        )


def test_finding_out_changes_nothing():
    torch.manual_seed(0)
    netD = nn.Sequential(nn.Conv2d(1, 4, 4, 4), nn.BatchNorm2d(4), nn.Dropout(), nn.Conv2d(4, 1, 4))
    netD[2].eval()
    before, state = copy.deepcopy(netD.state_dict()), torch.get_rng_state()
    engine = Engine(DCGANGenerator(NZ, 4, 1, SIZE), netD, device="cpu")
    state = torch.get_rng_state()
    engine._prepare_networks()
    assert_same(before, netD.state_dict())
    assert torch.equal(state, torch.get_rng_state())
    assert netD.training and not netD[2].training


def test_two_passes_are_said_once_with_the_reason(caplog):
    netD = nn.Sequential(nn.Conv2d(1, 4, 4, 4), nn.Dropout(), nn.Conv2d(4, 1, 4))
    engine = Engine(DCGANGenerator(NZ, 4, 1, SIZE), netD, device="cpu")
    with caplog.at_level(logging.WARNING, "fastgan"):
        engine.step(real())
        engine.step(real())
    assert [r.getMessage() for r in caplog.records] == [
        "D(real) and D(fake) run as two passes: 1 (Dropout) is not known to treat each sample alone"
    ]


def test_fuse_passes_true_insists():
    netD = nn.Sequential(nn.Conv2d(1, 4, 4, 4), nn.Dropout(), nn.Conv2d(4, 1, 4))
    engine = Engine(DCGANGenerator(NZ, 4, 1, SIZE), netD, device="cpu", fuse_passes=True)
    with pytest.raises(InputError, match=r"fuse_passes=True.*Dropout"):
        engine.step(real())


def test_spectral_norm_gets_its_two_power_iterations():
    """One a pass, as in the example's loop: the reason why it may not be grouped."""

    def build():
        torch.manual_seed(2)
        netD = nn.Sequential(
            nn.utils.parametrizations.spectral_norm(nn.Conv2d(1, 4, 4, 4)),
            nn.LeakyReLU(0.2),
            nn.Conv2d(4, 1, 4),
        )
        return DCGANGenerator(NZ, 4, 1, SIZE).double(), netD.double()

    auto, apart = (Engine(*build(), device="cpu", fuse_passes=f) for f in ("auto", False))
    for i in range(2):
        auto.step(real(seed=i))
        apart.step(real(seed=i))
    assert_same(auto.state_dict(), apart.state_dict())


def test_stats_come_in_one_transfer_as_floats():
    stats = make().step(real()).to_dict()
    assert list(stats) == ["loss_d", "loss_g", "d_real", "d_fake", "d_fake_g"]
    assert all(isinstance(value, float) for value in stats.values())
    assert 0 < stats["d_real"] < 1


def test_parameters_and_activations_are_channels_last():
    engine = make()
    seen = []
    engine.netG.main[3].register_forward_hook(lambda m, a, out: seen.append(out))
    engine.step(real())
    assert engine.netD.main[2].weight.is_contiguous(memory_format=torch.channels_last)
    assert seen[0].is_contiguous(memory_format=torch.channels_last)


needs_cpp = pytest.mark.skipif(bool(machine_reasons("cpp")), reason="no C++ kernels here")


def test_gradients_are_computed_where_the_choices_are_known():
    """On a GPU autograd has threads of its own, in which a context variable is not set."""
    engine, found = make(), []
    for network in (engine.netG, engine.netD):
        next(network.parameters()).register_hook(
            lambda grad: found.append(torch.autograd.is_multithreading_enabled()) or grad
        )
    engine.step(real())
    assert found == [False, False]
    assert torch.autograd.is_multithreading_enabled()


@needs_cpp
def test_a_resume_takes_the_ways_of_the_run_and_not_of_the_machine(prefer):
    def steps(engine, first, last):
        for i in range(first, last):
            engine.step(real(seed=i))
        return engine.state_dict()

    prefer("winograd2")
    engine = make(channels=8, seed=1)
    steps(engine, 0, 2)
    state = copy.deepcopy(engine.state_dict())
    whole = steps(engine, 2, 5)
    assert any("winograd2" in times for times in state["choices"].values())

    prefer("winograd4")
    resumed = make(channels=8, seed=2)
    resumed.load_state_dict(state)
    assert_same(steps(resumed, 2, 5), whole)

    other = make(channels=8, seed=2)
    other.load_state_dict({**state, "choices": {}})
    assert not torch.equal(
        steps(other, 2, 5)["netG"]["main.3.weight"], whole["netG"]["main.3.weight"]
    )


@needs_cpp
def test_the_gradients_of_a_step_are_float64s():
    """Of a whole step, on every weight: float32 on the C++ kernels against float64."""
    torch.manual_seed(0)
    netG, netD = DCGANGenerator(NZ, 16, 3, 32), DCGANDiscriminator(16, 3, 32)
    x, z = torch.rand(8, 3, 32, 32) * 2 - 1, torch.randn(8, NZ, 1, 1)

    def gradients(backend, dtype):
        nets = (copy.deepcopy(netG).to(dtype), copy.deepcopy(netD).to(dtype))
        # Without a step of D's the two see the same G(z): what is left is rounding.
        engine = Engine(*nets, device="cpu", backend=backend, lr=1e-30)
        engine.step(x.to(dtype), noise=z.to(dtype))
        return [p.grad.double() for net in nets for p in net.parameters()]

    truth = gradients("reference", torch.float64)
    own, torchs = gradients("cpp", torch.float32), gradients("reference", torch.float32)

    def errors(found):
        return [((f - t).norm() / t.norm()).item() for f, t in zip(found, truth, strict=True)]

    # Winograd's own error is below 4e-6, and goes through up to a dozen layers.
    for mine, theirs in zip(errors(own), errors(torchs), strict=True):
        assert mine < max(4.0 * theirs, 5e-5)


@needs_cpp
def test_adam_takes_weights_in_any_memory_format():
    """What torch's gives for the same numbers in the ordinary format."""

    def run(optimizer, memory_format):
        w = torch.randn(6, 5, 4, 4, generator=torch.Generator().manual_seed(0))
        p = nn.Parameter(w.to(memory_format=memory_format))
        rate = torch.tensor(1e-2, dtype=torch.float64)
        step = optimizer([p], lr=rate, fused=True, capturable=True)
        for i in range(3):
            draw = torch.Generator().manual_seed(i + 1)
            p.grad = torch.randn(p.shape, generator=draw).to(memory_format=memory_format)
            step.step()
        moments = step.state_dict()["state"][0]
        return [p.detach(), moments["exp_avg"], moments["exp_avg_sq"]]

    want = run(torch.optim.Adam, torch.contiguous_format)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        for got, expected in zip(run(Adam, memory_format), want, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-9)


@needs_cpp
def test_the_memory_of_a_step_does_not_grow():
    engine = make(backend="cpp")
    held = []
    for i in range(6):
        engine.step(real(seed=i))
        held.append(cpp.kernels().held_bytes())
    assert held[2] == held[-1]
