"""Any module in fused blocks: the same numbers, and the module as it was in every other way."""

import abc
import copy
import inspect
import io
import logging
import pickle

import pytest
import torch
import torch.nn.functional as F
from support.networks import NETWORKS, AttributeDiscriminator, ConvBlock, LightningGAN
from support.numerics import CPP, compiled, error
from torch import nn
from torch.nn.utils import parametrizations

from fastgan import Engine, InputError, accelerate, explain, saying, use_backend
from fastgan.nn import blocks
from fastgan.nn.grouped import grouped_forward, grouping_obstacle

FUSED_OPS = ("conv", "conv_bn_act", "conv_transpose_bn_act")


@pytest.fixture
def blocks_run(monkeypatch):
    """Counts the blocks that run fused, in a list that grows by one for each."""
    ran = []
    for name in FUSED_OPS:
        op = getattr(blocks, name)
        monkeypatch.setattr(
            blocks, name, lambda *args, _op=op, **kwargs: ran.append(_op) or _op(*args, **kwargs)
        )
    return ran


def build(name, dtype=torch.float32):
    torch.manual_seed(3)
    net = NETWORKS[name].build().to(dtype)
    for p in net.parameters():  # zeros and ones would hide what is left out or swapped
        p.data += 0.1 * torch.randn_like(p)
    return net, torch.randn(NETWORKS[name].shape, dtype=dtype)


def results(net, x, dtype=torch.float64):
    """Outputs, gradients and state of a training pass and an evaluation pass, by name."""
    net, found = copy.deepcopy(net), {}
    for mode in ("train", "eval"):
        getattr(net, mode)()
        net.zero_grad()
        leaf = x.clone().requires_grad_()
        torch.manual_seed(5)  # of dropout
        y = net(leaf)
        draw = torch.Generator().manual_seed(7)
        dy = torch.randn(y.shape, dtype=y.dtype, generator=draw)
        (y * dy).sum().backward()
        gradients = {f"{mode} grad {n}": p.grad for n, p in net.named_parameters()}
        found |= {f"{mode} y": y, f"{mode} grad x": leaf.grad, **gradients}
    found |= net.state_dict()
    return {k: None if v is None else v.detach().to(dtype) for k, v in found.items()}


def assert_same(got, want, limit):
    assert list(got) == list(want)
    for name, value in want.items():
        if value is None:
            assert got[name] is None, name
        else:
            assert off(got[name], value) <= limit, name


def off(got, want):
    """By norm. The gradient of a bias before batch norm is rounding of what cancels."""
    assert got.shape == want.shape and got.dtype == want.dtype
    got, want = got.detach().double(), want.detach().double()
    return float((got - want).norm() / max(want.norm(), 1e-2))


def statuses(net):
    return [row.status for row in explain(net)]


@pytest.mark.parametrize("name", NETWORKS)
def test_what_is_fused(name, blocks_run):
    network = NETWORKS[name]
    net, x = build(name)
    net(x)
    assert not blocks_run
    assert statuses(net) == ["would fuse"] * network.fused + ["left alone"] * network.left
    assert accelerate(net) is net
    assert statuses(net) == ["fused"] * network.fused + ["left alone"] * network.left
    assert all(row.reason for row in explain(net) if row.status == "left alone")
    if name == "lightning G":
        net.discriminator(net(x))
    else:
        net(x)
    assert len(blocks_run) == network.fused


@pytest.mark.parametrize("name", NETWORKS)
def test_float64_is_the_same(name):
    net, x = build(name, torch.float64)
    want = results(net, x)
    assert_same(results(accelerate(net), x), want, 0.0)
    assert_same(results(accelerate(net, undo=True), x), want, 0.0)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("backend", ["reference", CPP])
def test_float32_is_the_same_but_for_rounding(name, backend):
    net, x = build(name)
    truth = results(copy.deepcopy(net).double(), x.double())
    torchs_own = results(net, x)
    with use_backend(backend):
        got = results(accelerate(net), x)
    assert list(got) == list(truth)
    if backend == "reference":
        assert_same(got, torchs_own, 0.0)
    for key, value in truth.items():
        if value is not None:
            assert off(got[key], value) <= max(8 * off(torchs_own[key], value), 4e-6), key


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("weights", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("images", [torch.contiguous_format, torch.channels_last])
def test_memory_formats_are_as_pytorch_has_them(name, weights, images):
    """Or ``view`` would fail on what is returned."""
    net, x = build(name)
    net = nn.Sequential(net).to(memory_format=weights)
    x = x.to(memory_format=images) if x.shape[-1] > 1 and x.ndim == 4 else x
    seen = {}

    def see(module, inputs, output):
        seen.setdefault(module, []).append((inputs[0].stride(), output.stride()))

    parts = [m for m in net.modules() if isinstance(m, (nn.Dropout, nn.Dropout2d, nn.Linear))]
    for part in (net, *parts):
        part.register_forward_hook(see)
    try:
        net(x)
    except RuntimeError as error:
        pytest.skip(f"PyTorch itself: {error}")
    accelerate(net)(x)
    assert all(before == after for before, after in seen.values())


@pytest.mark.parametrize("name", NETWORKS)
def test_what_the_module_is_stays(name):
    net, _ = build(name)
    before = copy.deepcopy(net)
    identities = [id(p) for p in (*net.modules(), *net.parameters(), *net.buffers())]
    accelerate(net)
    assert [id(p) for p in (*net.modules(), *net.parameters(), *net.buffers())] == identities
    assert list(net.state_dict()) == list(before.state_dict())
    assert [vars(a).keys() for a in net.modules()] == [vars(b).keys() for b in before.modules()]
    assert repr(net) == repr(before)
    for mine, theirs in zip(net.modules(), before.modules(), strict=True):
        assert isinstance(mine, type(theirs)) and mine.training == theirs.training
        assert list(inspect.signature(mine.forward).parameters) == list(
            inspect.signature(theirs.forward).parameters
        )
    net.load_state_dict(before.state_dict())
    before.load_state_dict(net.state_dict())


@pytest.mark.parametrize("name", NETWORKS)
def test_undo_and_idempotence(name):
    net, _ = build(name)
    classes = [type(part) for part in net.modules()]
    strides = [p.stride() for p in net.parameters()]
    once = [type(part) for part in accelerate(net).modules()]
    assert (once != classes) == bool(NETWORKS[name].fused)
    assert [type(part) for part in accelerate(net).modules()] == once
    assert [p.stride() for p in net.parameters()] == strides
    accelerate(net, undo=True)
    assert [type(part) for part in net.modules()] == classes
    assert [p.stride() for p in net.parameters()] == strides
    assert "fused" not in statuses(net)
    assert [type(part) for part in accelerate(net, undo=True).modules()] == classes


def through_pickle(net):
    return pickle.loads(pickle.dumps(net))


def through_torch_save(net):
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle, through_torch_save])
@pytest.mark.parametrize("name", NETWORKS)
def test_copies_are_accelerated(name, copied, blocks_run):
    if name.startswith("SNGAN D") and copied is not copy.deepcopy:
        pytest.skip("PyTorch pickles no parametrized module, nor is there anything fused")
    net, x = build(name)
    other = copied(accelerate(net))
    assert [type(part) for part in other.modules()] == [type(part) for part in net.modules()]
    assert explain(other) == explain(net)
    assert_same(results(other, x), results(net, x), 0.0)
    assert bool(blocks_run) == bool(NETWORKS[name].fused)
    assert not {id(p) for p in other.parameters()} & {id(p) for p in net.parameters()}
    assert "fused" not in statuses(accelerate(other, undo=True))
    assert statuses(net).count("fused") == NETWORKS[name].fused


@pytest.mark.parametrize(
    "name", ["example D", "attributes D", "attributes G", "loop D", "nested D"]
)
def test_functional_call(name, blocks_run):
    net, x = build(name)
    other, _ = build(name)
    for p in other.parameters():
        p.data *= 1.5
    state = {k: v.clone() for k, v in other.state_dict().items()}
    got = torch.func.functional_call(accelerate(net), state, (x,))
    assert blocks_run
    assert error(got, other(x).double()) < 1e-5


@pytest.mark.parametrize("name", ["example G", "example D", "attributes D", "nested D", "loop D"])
@pytest.mark.parametrize("training", [True, False])
def test_compiled_as_one_graph(name, training):
    net, x = build(name)
    net.train(training)
    want = copy.deepcopy(net)
    run = compiled(accelerate(net), "eager")
    try:
        got = run(x)
    except torch._dynamo.exc.Unsupported as failure:
        if "ContextVar" not in str(failure):
            raise
        pytest.skip("this version of torch breaks a graph where the backend is looked up")
    assert error(got, want(x).double()) < 1e-5
    for key, value in want.state_dict().items():
        assert error(net.state_dict()[key].double(), value.double()) < 1e-5


def test_a_compiled_module_sees_hooks_and_changes():
    net, x = build("attributes D")
    run = torch.compile(accelerate(net), backend="eager")
    run(x)
    net.bn2.register_forward_hook(lambda module, inputs, y: y * 0.5)
    net.slope = 0.5
    want = accelerate(copy.deepcopy(net), undo=True)(x)
    assert error(run(x), want.double()) < 1e-5


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", ["example D", "attributes D"])
@pytest.mark.parametrize("inside", [False, True])
def test_distributed(name, inside, process_group, blocks_run):
    net, x = build(name)
    plain = copy.deepcopy(net)
    parallel = nn.parallel.DistributedDataParallel(net if inside else accelerate(net))
    if inside:
        assert accelerate(parallel) is parallel
    parallel(x).sum().backward()
    assert len(blocks_run) == NETWORKS[name].fused
    plain(x).sum().backward()
    for mine, theirs in zip(parallel.parameters(), plain.parameters(), strict=True):
        assert off(mine.grad, theirs.grad) < 1e-4


@pytest.mark.parametrize("name", ["example G", "example D", "attributes D", "pix2pix U-Net"])
def test_autocast(name, blocks_run):
    net, x = build(name)
    net.eval()
    want = net(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torchs_own, got = net(x), accelerate(net)(x)
    assert len(blocks_run) == NETWORKS[name].fused
    assert got.dtype == torchs_own.dtype == torch.bfloat16
    assert error(got, want.double()) < 4 * error(torchs_own, want.double()) + 1e-2
    got.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in net.parameters())


class ChannelsLast(nn.Module):
    def forward(self, x):
        return x.contiguous(memory_format=torch.channels_last)


def test_memory_formats_that_change_on_the_way():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), ChannelsLast(), nn.Conv2d(4, 4, 3))
    x = torch.randn(2, 3, 8, 8)
    want = net(x).stride()
    assert accelerate(net)(x).stride() == want
    assert want[1] == 1


class Seen:
    """A hook that scales what comes out, or the gradient, and counts."""

    def __init__(self, kind, module):
        self.calls = 0
        self.handle = getattr(module, f"register_{kind}")(getattr(self, kind))

    def forward_hook(self, module, inputs, output):
        self.calls += 1
        return output * 0.5

    def forward_pre_hook(self, module, inputs):
        self.calls += 1
        return inputs[0] * 0.5

    def full_backward_hook(self, module, grad_input, grad_output):
        self.calls += 1
        return (grad_input[0] * 0.5,)

    def full_backward_pre_hook(self, module, grad_output):
        self.calls += 1
        return (grad_output[0] * 0.5,)


HOOKS = ("forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook")


@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    ("name", "hooked"),
    [
        *(("attributes D", part) for part in ("conv2", "bn2", "act", "")),
        *(("nested D", part) for part in ("1.0", "1.1", "1.2", "1")),
    ],
)
def test_hooks_are_honoured(name, hooked, kind, when):
    net, x = build(name, torch.float64)
    plain = copy.deepcopy(net)
    x.requires_grad_()
    if when == "after":
        accelerate(net)
    seen = Seen(kind, net.get_submodule(hooked))
    Seen(kind, plain.get_submodule(hooked))
    if when == "before":
        accelerate(net)
    got, want = net(x), plain(x)
    assert error(got, want) < 1e-12
    both = [
        torch.autograd.grad(y.sum(), (x, *n.parameters())) for y, n in ((got, net), (want, plain))
    ]
    for mine, theirs in zip(*both, strict=True):
        assert off(mine, theirs) < 1e-12
    assert seen.calls == 1
    in_a_run = hooked not in ("", "1")
    assert any("has hooks" in row.reason for row in explain(net)) == in_a_run
    seen.handle.remove()
    assert statuses(accelerate(net)) == ["fused"] * 3
    assert not any("hooks" in row.reason for row in explain(net))


def test_hooks_on_every_module_are_honoured():
    net, x = build("example D")
    accelerate(net)
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(m))
    try:
        net(x)
        assert set(statuses(net)) == {"left alone"}
    finally:
        handle.remove()
    assert set(seen) == set(net.modules())
    assert set(statuses(net)) == {"fused"}


def conv(*args, cls=nn.Conv2d, c_in=3, **kwargs):
    return nn.Sequential(cls(c_in, 4, 3, *args, **kwargs), nn.BatchNorm2d(4), nn.ReLU())


class MyConv2d(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) + 1


def forward_replaced():
    net = conv()
    net[0].forward = lambda x: F.conv2d(x, net[0].weight) * 2
    return net


def sequential_replaced():
    net = conv()
    net.forward = lambda x: net[0](x)
    return net


@pytest.mark.parametrize(
    ("net", "reason"),
    [
        (conv(groups=2, c_in=4), "has groups=2"),
        (conv(dilation=2), "has dilation=(2, 2)"),
        (conv(padding_mode="reflect", padding=1), "has padding_mode='reflect'"),
        (conv(padding="same"), "has padding='same'"),
        (conv(stride=(1, 2)), "has stride=(1, 2)"),
        (conv(padding=(0, 1)), "has padding=(0, 1)"),
        (conv(2, cls=nn.ConvTranspose2d, output_padding=1), "has output_padding=(1, 1)"),
        (conv(cls=MyConv2d), "is a MyConv2d"),
        (conv(cls=lambda *args: parametrizations.weight_norm(nn.Conv2d(*args))), "is parametrized"),
        (conv(cls=lambda *args: nn.utils.weight_norm(nn.Conv2d(*args))), "has hooks"),
        (forward_replaced(), "has its forward replaced"),
        (sequential_replaced(), "has its forward replaced"),
        (nn.Conv2d(3, 4, 3), "has no parent"),
        (nn.ModuleList([nn.Conv2d(3, 4, 3)]), "has no forward"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
def test_what_is_left_alone_and_why(net, reason, blocks_run):
    classes = [type(part) for part in net.modules()]
    assert statuses(net) == ["left alone"]
    (row,) = explain(accelerate(net))
    assert row.status == "left alone" and reason in row.reason
    assert [type(part) for part in net.modules()] == classes
    if not isinstance(net, nn.ModuleList):
        net(torch.randn(2, 4 if "groups" in reason else 3, 8, 8))
    assert not blocks_run


class Own(nn.Module):
    """A module with a few layers, whose forward each subclass has."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.other, self.again = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.options, self.noise = {"slope": 0.2}, torch.ones(1)


class OutputUsedTwice(Own):
    def forward(self, x):
        h = self.conv(x)
        return self.again(self.other(self.bn(h)) + h)


class CalledTwice(Own):
    def forward(self, x):
        return F.relu(self.other(F.relu(self.other(self.bn(self.conv(x))))))


class DependsOnTraining(Own):
    def forward(self, x):
        return F.dropout(F.relu(self.bn(self.conv(x))), 0.5, self.training)


class DependsOnValues(Own):
    def forward(self, x):
        h = self.conv(x)
        return h if h.mean() > 0 else -h


class WithoutGradients(Own):
    def forward(self, x):
        with torch.no_grad():
            return self.conv(x)


class Decorated(Own):
    @torch.no_grad()
    def forward(self, x):
        return self.conv(x)


class ToldOfSubclasses(Own):
    def __init_subclass__(cls):
        raise AssertionError("a subclass was made")

    def forward(self, x):
        return self.conv(x)


class Autocast(Own):
    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.conv(x)


class Checkpointed(Own):
    def forward(self, x):
        return torch.utils.checkpoint.checkpoint(self.conv, x, use_reentrant=False)


class DrawsNoise(Own):
    def forward(self, x):
        return self.conv(x + torch.randn(1))


class DrawsScalars(Own):
    def forward(self, x):
        return self.conv(x) if torch.rand(1).item() < 2 else x


class AsksForTypes(Own):
    def forward(self, x):
        return self.conv(x) if isinstance(x, torch.Tensor) else self.conv(x[0])


class ReadsADict(Own):
    def forward(self, x):
        return F.leaky_relu(self.conv(x), self.options["slope"])


class ReadsATensor(Own):
    def forward(self, x):
        return self.conv(x) * self.noise


class SetsAttributes(Own):
    def forward(self, x):
        self.features = self.conv(x)
        return self.features


class Reversal(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dy):
        return -dy


class ReversesGradients(Own):
    def forward(self, x):
        return Reversal.apply(self.conv(x))


class ReadsTheWeight(Own):
    def forward(self, x):
        return F.conv2d(x, self.conv.weight)


class TakesAList(Own):
    def forward(self, *xs):
        return self.conv(xs[0])


@pytest.mark.parametrize(
    ("cls", "reason", "fused"),
    [
        (OutputUsedTwice, "the output of conv is used more than once", ["Conv2d"] * 3),
        (CalledTwice, "other is called 2 times", ["Conv2d + BatchNorm2d"]),
        (DependsOnTraining, "depends on self.training", []),
        (DependsOnValues, "cannot trace its forward", []),
        (WithoutGradients, "turns gradients", []),
        (Decorated, "turns gradients", []),
        (ToldOfSubclasses, "told of subclasses", []),
        (Autocast, "turns gradients, autocast", []),
        (Checkpointed, "checkpointing", []),
        (DrawsNoise, "draws random numbers", []),
        (DrawsScalars, "draws random numbers", []),
        (AsksForTypes, "type of a value", []),
        (ReadsADict, "reads self.options, a dict", []),
        (ReadsATensor, "tensor that is no parameter", []),
        (SetsAttributes, "sets features", []),
        (ReversesGradients, "its forward", []),
        (ReadsTheWeight, "is not called", []),
        (TakesAList, "its forward", []),
    ],
)
def test_what_a_forward_of_its_own_may_do(cls, reason, fused):
    net = cls().double()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    want = None if cls in (Autocast, Decorated, WithoutGradients) else results(net, x)
    random = torch.get_rng_state()
    keys = list(vars(net))
    rows = explain(accelerate(net))
    assert torch.equal(torch.get_rng_state(), random) and list(vars(net)) == keys and net.training
    assert [row.modules for row in rows if row.status == "fused"] == fused
    assert reason in " ".join(row.reason for row in rows if row.status == "left alone" or fused)
    assert (type(net) is cls) == (not fused)
    if want is not None:
        assert_same(results(net, x), want, 1e-12)


class Abstract(Own, abc.ABC):
    """A class with a metaclass, attributes of the class, and a property."""

    slope = 0.1

    @property
    def scale(self):
        return 2.0

    @abc.abstractmethod
    def activation(self, x): ...

    def forward(self, x):
        return self.activation(self.bn(self.conv(x))) * self.scale


class Concrete(Abstract):
    def activation(self, x):
        return F.leaky_relu(x, negative_slope=self.slope)


def test_attributes_of_the_class(blocks_run, monkeypatch):
    net = Concrete().double()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    want = results(net, x)
    assert_same(results(accelerate(net), x), want, 0.0)
    assert explain(net)[0].modules == "Conv2d + BatchNorm2d + leaky_relu" and blocks_run
    monkeypatch.setattr(Concrete, "slope", 0.9)
    want = accelerate(copy.deepcopy(net), undo=True)(x)
    assert torch.equal(net(x), want)


def test_a_class_made_of_the_accelerated_one_stays(blocks_run):
    net, x = build("attributes D")
    accelerate(net)
    wrapper = type("Sharded", (type(net),), {})
    net.__class__ = wrapper
    assert statuses(accelerate(accelerate(net, undo=True))) == ["fused"] * 3
    assert type(net) is wrapper
    net(x)
    assert len(blocks_run) == 3


class InPlace(Own):
    """What is done in place is seen under every name of a tensor, and not before it is done."""

    def forward(self, x):
        x = x * 1
        same = x
        h = self.conv(x)
        x += 1
        h = self.bn(h).relu_()
        x.mul_(2)
        out = self.other(h)
        out += h
        return torch.cat([out, same, x], 1)


@torch.no_grad()  # PyTorch refuses to differentiate this
def test_in_place_operations_keep_their_order(blocks_run):
    net = InPlace().double()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    want = copy.deepcopy(net)(x)
    assert torch.equal(accelerate(net)(x), want)
    fused = [row.modules for row in explain(net) if row.status == "fused"]
    assert fused == ["Conv2d + BatchNorm2d + relu", "Conv2d"] and blocks_run


class Tied(Own):
    def __init__(self):
        super().__init__()
        self.again.weight = self.other.weight

    def forward(self, x):
        return torch.tanh(self.again(torch.relu(self.other(self.bn(self.conv(x))))))


def test_shared_weights():
    net = Tied().double()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    want = results(net, x)
    assert_same(results(accelerate(net), x), want, 1e-12)
    assert net.again.weight is net.other.weight
    assert statuses(net) == ["fused"] * 3
    shared = nn.Conv2d(3, 3, 3, padding=1)
    twice = nn.Sequential(nn.Sequential(shared, nn.ReLU()), nn.Sequential(shared, nn.Tanh()))
    before = copy.deepcopy(twice)
    accelerate(twice)
    assert twice[0][0] is twice[1][0]
    x = torch.randn(2, 3, 8, 8)
    assert error(twice(x), before(x).double()) < 1e-5
    stride = before[0][0].weight.stride()
    assert accelerate(twice, undo=True)[0][0].weight.stride() == stride


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda net: setattr(net, "slope", 0.5), "self.slope is no longer 0.2"),
        (lambda net: vars(net).update(slope=0.5), "self.slope is no longer 0.2"),
        (lambda net: setattr(net, "bn2", None), "other children"),
        (lambda net: net.register_module("bn3", nn.BatchNorm2d(8)), "other children"),
    ],
)
def test_a_change_is_noticed_and_said_once(change, said, caplog, blocks_run, monkeypatch):
    class Changing(AttributeDiscriminator):
        def forward(self, x):
            x = F.leaky_relu(self.conv1(x), self.slope)
            x = self.conv2(x)
            return x if self.bn2 is None else self.bn2(x)

    monkeypatch.setattr(saying, "_said", set())
    net = accelerate(Changing(4))
    x = torch.randn(4, 3, 16, 16)
    net(x)
    assert len(blocks_run) == 2
    change(net)
    blocks_run.clear()
    with caplog.at_level(logging.WARNING, "fastgan"):
        got = [net(x), net(x)]
    assert not blocks_run
    assert [said in message for message in caplog.messages] == [True]
    assert set(statuses(net)) == {"left alone"} and said in explain(net)[0].reason
    assert torch.equal(got[0], accelerate(copy.deepcopy(net), undo=True)(x))
    assert set(statuses(accelerate(net))) - {"left alone"} == {"fused"}
    net(x)
    assert blocks_run


def test_what_was_not_read_may_change(blocks_run):
    net, x = build("attributes D")
    accelerate(net)
    net.title = "D"
    net.act = nn.ReLU()
    net.conv1 = nn.Conv2d(3, 4, 4, 2, 1)
    want = accelerate(copy.deepcopy(net), undo=True)(x)
    assert error(net(x), want.double()) < 1e-5
    assert len(blocks_run) == 3
    net.bn2 = nn.InstanceNorm2d(8)
    want = accelerate(copy.deepcopy(net), undo=True)(x)
    assert error(net(x), want.double()) < 1e-5


def test_lists_that_grow(blocks_run):
    net, x = build("loop D")
    accelerate(net)
    net.convs.append(nn.Conv2d(8, 8, 1))
    net.norms.append(nn.BatchNorm2d(8))
    want = accelerate(copy.deepcopy(net), undo=True)(x)
    assert torch.equal(net(x), want)
    assert not blocks_run


def test_other_arguments_take_the_forward_as_it_is(blocks_run):
    net, x = build("attributes D")
    before = copy.deepcopy(net)
    accelerate(net)
    for args, kwargs, fused in (
        ((x,), {}, 3),
        ((), {"x": x}, 3),
        ((x, True), {}, 0),
        ((x,), {"features": True}, 0),
        ((x, torch.tensor(True)), {}, 0),
    ):
        blocks_run.clear()
        assert error(net(*args, **kwargs), before(*args, **kwargs).double()) < 1e-5
        assert len(blocks_run) == fused
    assert {row.reason for row in explain(net)} == {"when called with x alone"}
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'x'"):
        net()


def test_unbatched_images():
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU())
    x = torch.randn(3, 8, 8)
    want = net(x)
    assert error(accelerate(net)(x), want.double()) < 1e-6
    with pytest.raises(ValueError, match="expected 4D input"):
        accelerate(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)))(x)


@pytest.mark.parametrize("options", [{}, {"fused": True}, {"foreach": True}])
def test_an_optimiser_goes_on(options):
    """Its moments keep the memory format that the weights had."""
    net, x = build("loop D", torch.float64)
    plain = copy.deepcopy(net)
    nets = net, plain
    optimizers = [torch.optim.Adam(n.parameters(), lr=1e-2, **options) for n in nets]
    for step in range(4):
        if step == 2:
            accelerate(net)
        for n, optimizer in zip(nets, optimizers, strict=True):
            n(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=step % 2 == 0)
    assert_same(net.state_dict(), plain.state_dict(), 1e-10)


@pytest.mark.parametrize("name", ["example D", "nested D"])
def test_the_engine_takes_an_accelerated_discriminator_in_one_pass(name):
    net, x = build(name, torch.float64)
    apart = copy.deepcopy(net)
    accelerate(net)
    if name == "nested D":
        assert grouping_obstacle(net) is None
        got = grouped_forward(net, x, 2)
        want = torch.cat([apart(part) for part in x.chunk(2)])
        assert error(got, want) < 1e-12
        hook = net[1].register_forward_hook(lambda *_: None)
        assert "hooks" in grouping_obstacle(net)
        hook.remove()
    netG, _ = build("example G", torch.float64)
    engines = []
    for netD in (net, apart):
        engine = Engine(copy.deepcopy(netG), netD, d_output="auto", noise=(8, 1, 1))
        draw = torch.Generator().manual_seed(1)
        if name == "example D":
            real = torch.rand(4, 3, 32, 32, dtype=torch.float64, generator=draw) * 2 - 1
            engine.step(real, noise=torch.randn(4, 8, 1, 1, dtype=torch.float64, generator=draw))
            engines.append(engine)
    for mine, theirs in zip(*(e.netD.parameters() for e in engines), strict=True):
        assert error(mine, theirs) < 1e-9


def test_networks_of_fastgans_run_fused_as_they_are(blocks_run):
    from fastgan import DCGANDiscriminator, DCGANGenerator

    for net in (DCGANGenerator(8, 4, 3, 16), DCGANDiscriminator(4, 3, 16)):
        classes = [type(part) for part in net.modules()]
        assert set(statuses(net)) == {"fused"}
        assert [type(part) for part in accelerate(net).modules()] == classes
        net.main.register_forward_hook(lambda *_: None)
        assert set(statuses(net)) == {"left alone"}


def test_the_table():
    net = LightningGAN(8, 4)
    net.generator.conv_blocks[3].register_forward_hook(lambda *_: None)
    net.discriminator.model[0] = parametrizations.spectral_norm(net.discriminator.model[0])
    lines = [" ".join(line.split()) for line in str(explain(net)).splitlines()]
    assert lines == [
        "convolution runs as status reason",
        "generator.conv_blocks.2 Conv2d would fuse 3 has hooks",
        "generator.conv_blocks.6 Conv2d + BatchNorm2d + LeakyReLU would fuse",
        "generator.conv_blocks.9 Conv2d + Tanh would fuse",
        "discriminator.model.0 ParametrizedConv2d left alone is parametrized",
        "discriminator.model.3 Conv2d + LeakyReLU would fuse",
    ]


def test_subclasses_of_sequential():
    net = ConvBlock(3, 4)
    accelerate(net)
    assert type(net) is not ConvBlock and isinstance(net, ConvBlock)
    assert type(net).__name__ == "ConvBlock" and statuses(net) == ["fused"]
    plain = accelerate(nn.Sequential(*net, nn.Tanh()))
    x = torch.randn(2, 3, 8, 8)
    assert error(plain[:2](x), plain[1](plain[0](x)).detach().double()) < 1e-5


@pytest.mark.parametrize("call", [accelerate, explain])
def test_what_is_no_module_is_refused(call):
    with pytest.raises(InputError, match=r"module=\[\].*not an nn.Module; give the network"):
        call([])
