"""Models: sizes, the example's keys and initialisation, checkpoints that pass both ways."""

import copy
import io
from types import SimpleNamespace

import pytest
import torch
from fastgan.benchmarks import example_dcgan as example
from torch import nn

from fastgan import DCGANDiscriminator, DCGANGenerator, build_model, register_model
from fastgan.errors import InputError
from fastgan.nn.grouped import grouped_forward, grouping_obstacle
from fastgan.nn.modes import evaluation_mode
from fastgan.nn.sizes import IMAGE_SIZES
from fastgan.ops.backend import use_backend

SIZES = (16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256)


def test_image_sizes():
    assert IMAGE_SIZES == SIZES


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("nc", [1, 3, 5])
def test_every_size_makes_images_and_logits(size, nc):
    netG, netD = build_model("dcgan", nz=5, ngf=2, ndf=2, nc=nc, image_size=size)
    images = netG(torch.randn(2, 5, 1, 1))
    assert images.shape == (2, nc, size, size)
    assert images.abs().max() <= 1.0
    assert netD(images).shape == (2,)
    assert torch.equal(netG.eval()(torch.ones(1, 5)), netG(torch.ones(1, 5, 1, 1)))


@pytest.mark.parametrize(
    ("size", "nearest"),
    [(8, "16 and 20"), (30, "28 and 32"), (60, "56 and 64"), (100, "96 and 112"),
     (257, "224 and 256"), (512, "224 and 256"), (-3, "16 and 20"), (0, "16 and 20")],
)  # fmt: skip
def test_another_size_names_the_nearest_two(size, nearest):
    with pytest.raises(InputError, match=f"image_size={size} .*the nearest are {nearest}"):
        DCGANGenerator(image_size=size)
    with pytest.raises(InputError, match=nearest):
        DCGANDiscriminator(image_size=size)


@pytest.mark.parametrize("name", ["nz", "ngf", "nc"])
def test_a_size_of_nought_is_refused(name):
    with pytest.raises(InputError, match=f"{name}=0"):
        DCGANGenerator(**{name: 0})


def example_networks(nz, ngf, ndf, nc, size):
    netG = example.Generator(nz, ngf, nc, size)
    netG.apply(example.weights_init)
    netD = example.Discriminator(ndf, nc, size)
    netD.apply(example.weights_init)
    return netG, netD


def test_the_same_seed_gives_the_examples_weights():
    torch.manual_seed(7)
    want = example_networks(100, 64, 64, 3, 64)
    torch.manual_seed(7)
    got = build_model("dcgan", nz=100, ngf=64, ndf=64, nc=3, image_size=64)
    for mine, theirs in zip(got, want, strict=True):
        assert list(mine.state_dict()) == list(theirs.state_dict())
        for key, value in theirs.state_dict().items():
            assert torch.equal(mine.state_dict()[key], value), key


def test_the_examples_keys_at_64():
    """Written out, since the transcription could be wrong in the same way."""
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    layout = {0: ("weight",), 1: norm, 3: ("weight",), 4: norm, 6: ("weight",), 7: norm}
    g = {f"main.{i}.{k}" for i, ks in {**layout, 9: ("weight",), 10: norm, 12: ("weight",)}.items()
         for k in ks}  # fmt: skip
    layout = {0: ("weight",), 2: ("weight",), 3: norm, 5: ("weight",), 6: norm, 8: ("weight",)}
    d = {f"main.{i}.{k}" for i, ks in {**layout, 9: norm, 11: ("weight",)}.items() for k in ks}
    assert set(DCGANGenerator().state_dict()) == g
    assert set(DCGANDiscriminator().state_dict()) == d
    assert DCGANGenerator().main[0].weight.shape == (100, 512, 4, 4)
    assert DCGANDiscriminator().main[11].weight.shape == (1, 512, 4, 4)


@pytest.mark.parametrize("size", [28, 64])
@pytest.mark.parametrize("nc", [1, 3])
def test_an_examples_checkpoint_loads_and_exports_back(size, nc):
    theirs_g, theirs_d = example_networks(10, 4, 6, nc, size)
    z = torch.randn(8, 10, 1, 1)
    theirs_d(theirs_g(z))  # move the running statistics
    files = []
    for net in (theirs_g, theirs_d):
        files.append(io.BytesIO())
        torch.save(net.state_dict(), files[-1])
        files[-1].seek(0)
    netG = DCGANGenerator.from_state_dict(torch.load(files[0], weights_only=True))
    netD = DCGANDiscriminator.from_state_dict(torch.load(files[1], weights_only=True))
    assert (netG.nz, netG.ngf, netG.nc, netG.image_size) == (10, 4, nc, size)
    assert (netD.ndf, netD.nc, netD.image_size) == (6, nc, size)
    with evaluation_mode(netG), evaluation_mode(theirs_g), use_backend("reference"):
        images = netG(z)
        assert torch.equal(images, theirs_g(z))
    with evaluation_mode(netD), evaluation_mode(theirs_d):
        assert torch.equal(netD(images).sigmoid(), theirs_d(images))
    for mine, theirs in ((netG, theirs_g), (netD, theirs_d)):
        back = copy.deepcopy(theirs)
        back.load_state_dict(mine.state_dict())
        for key, value in theirs.state_dict().items():
            assert torch.equal(back.state_dict()[key], value)


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"fc.weight": torch.zeros(3, 3)},
        {f"main.{i}.weight": torch.zeros(4, 4, 3, 3) for i in range(4)},
        DCGANDiscriminator(4).state_dict(),
    ],
)
def test_another_networks_state_is_refused(state):
    with pytest.raises(InputError):
        DCGANGenerator.from_state_dict(state)


def test_registry():
    def mine(**sizes):
        return nn.Linear(sizes["nz"], 3), nn.Linear(3, 1)

    register_model("test-mine", mine)
    register_model("test-mine", mine)
    netG, _ = build_model("test-mine", nz=2, ngf=1, ndf=1, nc=1, image_size=16)
    assert netG.in_features == 2
    with pytest.raises(InputError, match="test-mine"):
        register_model("test-mine", lambda **_: mine())
    with pytest.raises(InputError, match=r"'stylegan'.*dcgan"):
        build_model("stylegan", nz=1, ngf=1, ndf=1, nc=1, image_size=16)


def test_installed_packages_add_models(monkeypatch):
    entry = SimpleNamespace(name="test-installed", load=lambda: lambda **sizes: (1, sizes["nz"]))
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: [entry])
    assert build_model("test-installed", nz=2, ngf=1, ndf=1, nc=1, image_size=16) == (1, 2)


def with_layers(*extra):
    return nn.Sequential(
        nn.Conv2d(3, 4, 4, 2, 1), nn.BatchNorm2d(4), nn.LeakyReLU(0.2), *extra, nn.Conv2d(4, 1, 8)
    )


def no_longer_tracking():
    norm = nn.BatchNorm2d(4)
    norm.track_running_stats = False
    return norm


@pytest.mark.parametrize(
    "module",
    [
        DCGANDiscriminator(3, 3, 16),
        with_layers(),
        with_layers(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, momentum=None))),
        with_layers(nn.BatchNorm2d(4, track_running_stats=False)),
        with_layers(nn.BatchNorm2d(4, affine=False)),
        with_layers(no_longer_tracking()),
    ],
)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("groups", [1, 2, 3])
def test_grouped_forward_equals_one_pass_a_group(module, training, groups):
    module = copy.deepcopy(module).double().train(training)
    apart = copy.deepcopy(module)
    x = torch.randn(6, 3, 16, 16, dtype=torch.float64, requires_grad=True)
    assert grouping_obstacle(module) is None
    got = grouped_forward(module, x, groups)
    (got_grad,) = torch.autograd.grad(got.pow(2).sum(), x)
    want = torch.cat([apart(part) for part in x.chunk(groups)])
    (want_grad,) = torch.autograd.grad(want.pow(2).sum(), x)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got_grad, want_grad, rtol=1e-10, atol=1e-12)
    for key, value in apart.state_dict().items():
        torch.testing.assert_close(module.state_dict()[key], value, rtol=1e-12, atol=0)


class MinibatchSpread(nn.Module):
    def forward(self, x):
        return x - x.mean(0, keepdim=True)


class OtherForward(DCGANDiscriminator):
    def forward(self, x):
        return super().forward(x - x.mean(0))


def hooked():
    module = with_layers()
    module[0].register_forward_hook(lambda *_: None)
    return module


def replaced():
    module = with_layers()
    module[1].forward = lambda x: x
    return module


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (with_layers(MinibatchSpread()), "MinibatchSpread"),
        (with_layers(nn.Dropout()), "Dropout"),
        (with_layers(nn.utils.parametrizations.spectral_norm(nn.Conv2d(4, 4, 1))), "parametrized"),
        (nn.utils.spectral_norm(nn.Conv2d(3, 4, 1)), "hooks"),
        (OtherForward(3, 3, 16), "OtherForward"),
        (hooked(), "hooks"),
        (replaced(), "replaced"),
        (with_layers(nn.SyncBatchNorm(4)), "SyncBatchNorm"),
    ],
)
def test_grouping_obstacles(module, reason):
    assert reason in grouping_obstacle(module)


def test_evaluation_mode_gives_each_part_its_mode_back():
    module = with_layers()
    module[1].eval()
    with evaluation_mode(module):
        assert not any(part.training for part in module.modules())
    assert module.training and not module[1].training
