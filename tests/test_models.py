"""MLP, ResNet, deeper DCGAN, their conditional wrappers and spectral norm, against plain torch."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from support.capture_guard import CaptureGuard
from support.numerics import CPP, error
from torch import nn
from torch.nn.utils import parametrizations

from fastgan import DCGANDiscriminator, DCGANGenerator, build_model, explain, register_model
from fastgan.errors import InputError
from fastgan.nn import blocks
from fastgan.nn.conditional import ConditionalGenerator, LabelPlanes, Projection
from fastgan.nn.grouped import grouped_forward, grouping_obstacle
from fastgan.nn.mlp import MLPDiscriminator, MLPGenerator
from fastgan.nn.resnet import ResNetDiscriminator, ResNetGenerator
from fastgan.nn.spectral import apply_spectral_norm
from fastgan.ops.backend import use_backend

N, NZ, CLASSES = 6, 5, 3
LABELS = torch.tensor([0, 2, 1, 2, 2, 0])
MODELS = {
    "mlp": {},
    "resnet": {},
    "dcgan": {},
    "deep dcgan": {"extra_layers": 2},
    "plain dcgan": {"extra_layers": 1, "norm_d": "none"},
}
CONDITIONS = ("none", "planes", "projection")


def build(name, condition="none", size=16, nc=2, **settings):
    torch.manual_seed(3)
    n_classes = 0 if condition == "none" else CLASSES
    settings = {**MODELS[name], **settings}
    sizes = {"nz": NZ, "ngf": 4, "ndf": 4, "nc": nc, "image_size": size}
    name = name.split()[-1]
    nets = build_model(name, **sizes, n_classes=n_classes, condition=condition, **settings)
    for net in nets:
        for p in net.parameters():  # zeros and ones would hide what is left out or swapped
            p.data += 0.1 * torch.randn_like(p)
    return nets


def results(call, module, *inputs):
    """What ``call`` returns, and the gradients of the inputs and of ``module``'s parameters."""
    leaves = [x.clone().requires_grad_() if x.is_floating_point() else x for x in inputs]
    y = call(*leaves)
    weights = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape)
    wanted = [x for x in leaves if x.requires_grad] + list(module.parameters())
    return [y.detach(), *torch.autograd.grad((weights * y).sum(), wanted)]


def assert_equal(got, want, tolerance=1e-12):
    assert len(got) == len(want) > 1
    # Of a bias before a batch norm the gradient is zero but for rounding.
    floor = 1e-2 * max(b.norm() for b in want)
    for a, b in zip(got, want, strict=True):
        assert (a - b).norm() <= tolerance * max(b.norm(), floor)


class Parameters:
    """Those of a module, in the order in which a transcription asks for them."""

    def __init__(self, module):
        self._left = list(module.parameters())

    def take(self, n=2):
        taken, self._left = self._left[:n], self._left[n:]
        return taken

    def norm(self, x):
        return F.relu(F.batch_norm(x, None, None, *self.take(), training=True))

    def conv(self, x):
        weight, bias = self.take()
        return F.conv2d(x, weight, bias, padding=weight.shape[2] // 2)


def paper_resnet_generator(netG, z, s0, k):
    """Miyato et al. 2018, each shortcut's convolution after its up-sampling as in their code."""
    p = Parameters(netG)
    x = F.linear(z, *p.take()).view(len(z), -1, s0, s0)
    for _ in range(k):
        up = F.interpolate(p.norm(x), scale_factor=2)
        main = p.conv(p.norm(p.conv(up)))
        x = main + p.conv(F.interpolate(x, scale_factor=2))
    x = torch.tanh(p.conv(p.norm(x)))
    assert not p.take()
    return x


def paper_resnet_discriminator(netD, x, k):
    """And after the convolution, here, its down-sampling; the last block has no down-sampling."""
    p = Parameters(netD)
    for i in range(k + 1):
        main = p.conv(F.relu(p.conv(F.relu(x) if i else x)))
        x = F.avg_pool2d(main, 2) + F.avg_pool2d(p.conv(x), 2) if i < k else main + x
    y = F.linear(F.relu(x).sum((2, 3)), *p.take())
    assert not p.take()
    return y[:, 0]


def test_resnet_is_the_papers():
    netG, netD = (net.double() for net in build("resnet", size=28))
    z, x = torch.randn(N, NZ).double(), torch.randn(N, 2, 28, 28).double()
    want = results(lambda z: paper_resnet_generator(netG, z, 7, 2), netG, z)
    assert_equal(results(netG, netG, z), want)
    want = results(lambda x: paper_resnet_discriminator(netD, x, 2), netD, x)
    assert_equal(results(netD, netD, x), want)


def test_resnet_has_the_papers_channels_and_initialisation():
    """For ImageNet at 128: G's blocks 1024 to 64, D's 64 to 1024; Glorot with its gains."""
    with torch.device("meta"):
        netG, netD = ResNetGenerator(image_size=128), ResNetDiscriminator(image_size=128)
    assert netG.start.out_features == 1024 * 4 * 4
    assert [b.main[3].out_channels for b in netG.main[:5]] == [1024, 512, 256, 128, 64]
    convs = [[m for m in b.main if isinstance(m, nn.Conv2d)] for b in netD.main[:6]]
    assert [c[-1].out_channels for c in convs] == [64, 128, 256, 512, 1024, 1024]
    netG, netD = ResNetGenerator(image_size=16), ResNetDiscriminator(image_size=16)
    for net in (netG, netD):
        for name, m in net.named_modules():
            if isinstance(m, (nn.Conv2d, nn.Linear)):
                residual = isinstance(m, nn.Conv2d) and ".main." in name
                taps = m.weight[0, 0].numel()
                limit = math.sqrt(6 / taps / (m.weight.shape[0] + m.weight.shape[1]))
                limit *= math.sqrt(2) if residual else 1
                # Of so many numbers from -limit to limit the largest is near it.
                assert 0.9 * limit < m.weight.abs().max() <= limit, name
                assert not m.bias.any()


def plain_mlp(net, x, ends, slope):
    p = Parameters(net)
    normed = any(isinstance(m, nn.BatchNorm1d) for m in net.modules())
    linears = sum(isinstance(m, nn.Linear) for m in net.modules())
    x = x.reshape(len(x), -1)
    for _ in range(linears - 1):
        x = F.linear(x, *p.take(1 if normed else 2))
        if normed:
            x = F.batch_norm(x, None, None, *p.take(), training=True)
        x = F.leaky_relu(x, slope)
    x = ends(F.linear(x, *p.take()))
    assert not p.take()
    return x


@pytest.mark.parametrize("batch_norm", [True, False])
@pytest.mark.parametrize("shape", [(2, 5, 5), (2,)])
def test_mlp_is_its_formula(shape, batch_norm):
    netG = MLPGenerator(NZ, (7, 6), shape, batch_norm).double()
    netD = MLPDiscriminator(shape, (6, 7)).double()
    z, x = torch.randn(N, NZ).double(), torch.randn(N, *shape).double()

    def ends(y):
        return (torch.tanh(y) if len(shape) == 3 else y).view(N, *shape)

    assert_equal(results(netG, netG, z), results(lambda z: plain_mlp(netG, z, ends, 0), netG, z))
    assert torch.equal(netG.eval()(z), netG(z[:, :, None, None]))
    want = results(lambda x: plain_mlp(netD, x, torch.flatten, 0.2), netD, x)
    assert_equal(results(netD, netD, x), want)
    assert torch.equal(netD(x), netD.score(netD.features(x)))


def in_order(net, x):
    for module in net.main:
        x = module(x)
    return x


@pytest.mark.parametrize("size", [16, 28])
@pytest.mark.parametrize("norm", ["batch", "none"])
def test_a_deeper_dcgan_is_its_layers_in_order(size, norm):
    netG = DCGANGenerator(NZ, 4, 1, size, 2).double()
    netD = DCGANDiscriminator(4, 1, size, 2, norm).double()
    assert [m.out_channels for m in netG.main if isinstance(m, nn.Conv2d)] == [8, 8, 4, 4]
    assert [m.stride[0] for m in netD.main if isinstance(m, nn.Conv2d)] == [2, 1, 1, 2, 1, 1, 1]
    norms = sum(isinstance(m, nn.BatchNorm2d) for m in netD.main)
    assert (norms, netD.main[2].bias is None) == ((5, True) if norm == "batch" else (0, False))
    z, x = torch.randn(N, NZ, 1, 1).double(), torch.randn(N, 1, size, size).double()
    assert_equal(results(netG, netG, z), results(lambda z: in_order(netG, z), netG, z))
    want = results(lambda x: in_order(netD, x).flatten(), netD, x)
    assert_equal(results(netD, netD, x), want)
    for net, cls in ((netG, DCGANGenerator), (netD, DCGANDiscriminator)):
        other = cls.from_state_dict(net.float().state_dict())
        assert repr(other) == repr(net)
        assert all(map(torch.equal, other.state_dict().values(), net.state_dict().values()))


@pytest.mark.parametrize("backend", [CPP])
@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("name", MODELS)
def test_fused_is_the_reference_but_for_rounding(name, condition, backend):
    netG, netD = build(name, condition)
    given = () if condition == "none" else (LABELS,)
    for net, x in ((netG, torch.randn(N, NZ, 1, 1)), (netD, torch.randn(N, 2, 16, 16))):
        double = copy.deepcopy(net).double()
        truth = results(double, double, x.double(), *given)
        with use_backend("reference"):
            torchs_own = results(net, net, x, *given)
        with use_backend(backend):
            got = results(net, net, x, *given)
        for a, own, b in zip(got, torchs_own, truth, strict=True):
            assert error(a, b) <= max(8 * error(own, b), 4e-6)


@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("name", MODELS)
def test_one_pass_is_one_for_each_group(name, condition):
    netD = build(name, condition)[1].double()
    assert grouping_obstacle(netD) is None
    apart = copy.deepcopy(netD)
    given = () if condition == "none" else (LABELS,)
    x = torch.randn(N, 2, 16, 16).double()
    got = results(lambda x, *given: grouped_forward(netD, x, 2, *given), netD, x, *given)

    def twice(x, *given):
        parts = zip(*(t.chunk(2) for t in (x, *given)), strict=True)
        return torch.cat([apart(*part) for part in parts])

    assert_equal(got, results(twice, apart, x, *given), 1e-10)
    for key, value in apart.state_dict().items():
        torch.testing.assert_close(netD.state_dict()[key], value, rtol=1e-12, atol=0)


@pytest.mark.parametrize("size", [16, 28, 32, 64])
@pytest.mark.parametrize("name", ["mlp", "resnet"])
def test_sizes_and_state_dicts(name, size):
    nets, others = build(name, "projection", size, 3), build(name, "projection", size, 3)
    z = torch.randn(2, NZ)
    found = []
    for netG, netD in (nets, others):
        for other, net in zip((netG, netD), nets, strict=True):
            other.load_state_dict({k: v.clone() for k, v in net.state_dict().items()})
            other.eval()
        images = netG(z, LABELS[:2])
        found += [images, netD(images, LABELS[:2])]
    assert found[0].shape == (2, 3, size, size) and found[0].abs().max() <= 1.0
    assert found[1].shape == (2,)
    assert torch.equal(found[0], found[2]) and torch.equal(found[1], found[3])


def test_an_mlp_takes_any_image_and_is_as_wide_as_documented():
    netG, netD = build_model("mlp", nz=9, ngf=2, ndf=3, nc=3, image_size=1)
    assert [m.out_features for m in netG.main if isinstance(m, nn.Linear)] == [8, 16, 32, 3]
    assert [m.out_features for m in netD.main if isinstance(m, nn.Linear)] == [24, 12, 1]
    assert netD(netG(torch.randn(2, 9))).shape == (2,)


SIZES = {"nz": NZ, "ngf": 2, "ndf": 2, "nc": 1, "image_size": 16}


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: MLPGenerator(0, (3,), (2,)), "nz=0"),
        (lambda: MLPGenerator(3, (), (2,)), r"hidden=\(\)"),
        (lambda: MLPDiscriminator((1, 0, 2), (3,)), r"in_shape=\(1, 0, 2\)"),
        (lambda: MLPDiscriminator((2,), (3,), "gelu"), "activation='gelu'.*leaky_relu"),
        (lambda: ResNetGenerator(image_size=30), "image_size=30 .*28 and 32"),
        (lambda: ResNetDiscriminator(ndf=0), "ndf=0"),
        (lambda: DCGANGenerator(extra_layers=-1), "extra_layers=-1"),
        (lambda: DCGANDiscriminator(norm="layer"), "norm='layer'.*batch, none"),
        (lambda: build_model("mlp", **{**SIZES, "image_size": 257}), "image_size=257 .*1 to 256"),
        (lambda: build_model("resnet", **SIZES, extra_layers=1), "extra_layers=1.*no options"),
        (lambda: build_model("dcgan", **SIZES, depth=1), "depth=1.*extra_layers, norm_d"),
        (lambda: build_model("dcgan", **SIZES, n_classes=-1), "n_classes=-1"),
        (
            lambda: build_model("dcgan", **SIZES, n_classes=2, condition="none"),
            "condition='none': choose from planes, projection",
        ),
        (lambda: ConditionalGenerator(DCGANGenerator(5), 2, 5, 2), "netG.nz=5.*length 7"),
        (lambda: LabelPlanes(nn.Conv2d(2, 1, 4), 0, 4), "n_classes=0"),
        (lambda: Projection(nn.Conv2d(2, 1, 4), 2), "Conv2d.*features.*planes"),
    ],
)
def test_wrong_arguments(make, said):
    with pytest.raises(InputError, match=said):
        make()


class TestConditional:
    @pytest.mark.parametrize("name", ["mlp", "resnet", "dcgan"])
    def test_the_formulas(self, name):
        """Only the vectors of the classes in a batch get a gradient: class 1 is not in it."""
        labels = torch.tensor([0, 2, 2, 0, 2, 0])
        for condition in CONDITIONS[1:]:
            netG, netD = (net.double().eval() for net in build(name, condition))
            z, x = torch.randn(N, NZ).double(), torch.randn(N, 2, 16, 16).double()
            vectors = netG.embedding.weight[labels]
            images = netG(z[:, :, None, None], labels)
            torch.testing.assert_close(images, netG.netG(torch.cat([z, vectors], 1)))
            vectors = netD.embedding.weight[labels]
            if condition == "planes":
                want = netD.netD(torch.cat([x, vectors.view(N, 1, 16, 16)], 1))
            else:
                h = netD.netD.features(x)
                pooled = h if h.ndim == 2 else h.sum((2, 3))
                want = netD.netD(x) + (vectors * pooled).sum(1)
            scores = netD(x, labels)
            torch.testing.assert_close(scores, want)
            for net, y in ((netG, images), (netD, scores)):
                y.square().sum().backward()
                reached = net.embedding.weight.grad.abs().sum(1) > 0
                assert reached.tolist() == [True, False, True]
            assert (netG(z, labels) - netG(z, 2 - labels)).abs().amax((1, 2, 3)).min() > 1e-4
            assert (scores - netD(x, 2 - labels)).abs().min() > 1e-6

    def test_a_builder_is_asked_for_the_sizes_within(self):
        asked = []

        def mine(**sizes):
            asked.append(sizes)
            return nn.Conv2d(sizes["nz"], 1, 1), nn.Conv2d(sizes["nc"], 1, 16)

        register_model("test-conditional", mine, ["width"])
        netG, netD = build_model("test-conditional", **SIZES, n_classes=60, width=7)
        assert netG(torch.ones(2, NZ, 1, 1), torch.tensor([0, 59])).shape == (2, 1, 1, 1)
        assert netD(torch.ones(2, 1, 16, 16), torch.tensor([0, 59])).shape == (2, 1, 1, 1)
        assert (netG.nz, netG.n_classes, netD.n_classes) == (NZ, 60, 60)
        assert netG.embedding.weight.shape == (60, 50)
        assert all(sizes["width"] == 7 for sizes in asked)
        with pytest.raises(InputError, match="features"):
            build_model("test-conditional", **SIZES, n_classes=2, condition="projection")

    @pytest.mark.parametrize("condition", ["planes", "projection"])
    def test_a_graph_could_hold_it(self, condition):
        netG, netD = build("resnet", condition)
        both = [*netG.parameters(), *netD.parameters()]
        z = torch.randn(N, NZ)

        def step():
            images = netG(z, LABELS)
            scores = grouped_forward(netD, torch.cat([images, images]), 2, LABELS.repeat(2))
            for p, g in zip(both, torch.autograd.grad(scores.square().sum(), both), strict=True):
                p.data.sub_(g, alpha=1e-4)

        step()
        CaptureGuard().run(step, [netG, netD, z, LABELS])

    def test_an_embedding_by_frequency_is_not_grouped(self):
        netD = LabelPlanes(MLPDiscriminator((2, 4, 4), (3,)), 2, 4)
        netD.embedding = nn.Embedding(2, 16, scale_grad_by_freq=True)
        assert "embedding (Embedding)" in grouping_obstacle(netD)


def unfused(netD):
    """A copy whose layers run as PyTorch's modules, one after another."""
    plain = copy.deepcopy(netD)
    for part in plain.modules():
        if isinstance(part, nn.Sequential):
            part.register_forward_hook(lambda *_: None)
    return plain


@pytest.fixture
def blocks_run(monkeypatch):
    """Counts the blocks that run fused, in a list that grows by one for each."""
    ran = []
    for name in ("conv", "conv_bn_act"):
        op = getattr(blocks, name)
        monkeypatch.setattr(
            blocks, name, lambda *args, _op=op, **kwargs: ran.append(_op) or _op(*args, **kwargs)
        )
    return ran


class TestSpectralNorm:
    @pytest.mark.parametrize("backend", ["reference", CPP])
    @pytest.mark.parametrize("name", ["resnet", "dcgan", "plain dcgan"])
    def test_three_steps_are_plain_torchs(self, name, backend, blocks_run):
        netD = build(name, spectral_norm=True)[1]
        convs = sum(isinstance(m, nn.Conv2d) for m in netD.modules())
        plain = unfused(netD)
        if backend == "reference":
            netD, plain = netD.double(), plain.double()
        tolerance = 1e-11 if backend == "reference" else 2e-5
        pair = [(net, torch.optim.SGD(net.parameters(), 0.01)) for net in (netD, plain)]
        dtype = next(netD.parameters()).dtype
        for step in range(3):
            x = torch.randn(N, 2, 16, 16, dtype=dtype)
            for i, (net, opt) in enumerate(pair):
                opt.zero_grad()
                before = len(blocks_run)
                with use_backend(backend):
                    net(x).square().sum().backward()
                assert len(blocks_run) - before == (0 if i else convs)
            for (key, a), b in zip(netD.named_parameters(), plain.parameters(), strict=True):
                assert error(a.grad, b.grad.double()) <= tolerance, (step, key)
            for _, opt in pair:
                opt.step()
        for (key, a), b in zip(netD.state_dict().items(), plain.state_dict().values(), strict=True):
            assert error(a, b.double()) <= tolerance, key

    def test_every_layer_has_it(self):
        """Once a pass each, in a projection's embedding too, and the planes have none."""
        for condition in CONDITIONS[1:]:
            netD = build("resnet", condition, spectral_norm=True)[1]
            apply_spectral_norm(netD)
            normed = {n for n, m in netD.named_modules() if isinstance(m, nn.Module)
                      and getattr(m, "parametrizations", None)}  # fmt: skip
            layers = {n for n, m in netD.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
            assert normed == layers | ({"embedding"} if condition == "projection" else set())
            passes = []
            for m in netD.modules():
                if isinstance(m, parametrizations._SpectralNorm):
                    m.register_forward_hook(lambda m, *_, seen=passes: seen.append(m))
            netD(torch.randn(N, 2, 16, 16), LABELS)
            assert len(passes) == len(set(passes)) == len(normed)
            assert "parametrized" in grouping_obstacle(netD)
            assert {row.status for row in explain(netD)} == {"fused"}

    def test_other_changes_of_a_weight_are_left_to_the_module(self, blocks_run):
        def conv():
            return nn.Conv2d(2, 3, 4, 2, 1)

        twice = parametrizations.spectral_norm(parametrizations.weight_norm(conv()))
        bias = parametrizations.spectral_norm(parametrizations.spectral_norm(conv()), "bias")
        hooked = parametrizations.spectral_norm(conv())
        hooked.register_forward_hook(lambda *_: None)
        for other in (parametrizations.weight_norm(conv()), twice, bias, hooked):
            net = nn.Sequential(other, nn.ReLU())
            want = copy.deepcopy(other)(torch.ones(1, 2, 8, 8)).relu()
            assert torch.equal(grouped_forward(net, torch.ones(1, 2, 8, 8), 1), want)
        assert not blocks_run
        net = nn.Sequential(parametrizations.spectral_norm(conv()), nn.ReLU())
        grouped_forward(net, torch.ones(1, 2, 8, 8), 1)
        assert len(blocks_run) == 1


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("groups", [1, 2])
def test_a_batch_norm_and_its_activation_are_one_call(training, groups, monkeypatch):
    """Of a linear layer, of a convolution that is not next to it, and of none."""
    net = nn.Sequential(
        *(nn.BatchNorm2d(2), nn.LeakyReLU(0.3), nn.AvgPool2d(2), nn.BatchNorm2d(2), nn.Tanh()),
        *(nn.Flatten(), nn.Linear(8, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.BatchNorm1d(5)),
    )
    net = net.double().train(training)
    apart = copy.deepcopy(net)
    called, op = [], blocks.bn_act

    def bn_act(*args, **kwargs):
        called.append(kwargs["activation"])
        return op(*args, **kwargs)

    monkeypatch.setattr(blocks, "bn_act", bn_act)
    x = torch.randn(N, 2, 4, 4).double()
    got = results(lambda x: grouped_forward(net, x, groups), net, x)
    assert called == ["leaky_relu", "tanh", "relu", "none"]
    want = results(lambda x: torch.cat([apart(part) for part in x.chunk(groups)]), apart, x)
    assert_equal(got, want)
    for key, value in apart.state_dict().items():
        torch.testing.assert_close(net.state_dict()[key], value, rtol=1e-12, atol=0)
    with pytest.raises(ValueError, match="expected 4D input"):
        grouped_forward(net, x[:, 0], groups)
