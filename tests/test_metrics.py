"""Features, the figures of quality, the cached statistics of real sets, copies."""

import dataclasses
import hashlib
import io
import itertools
import json
import math
import urllib.error

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch_fidelity import feature_extractor_inceptionv3 as fidelity_inception
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric
from torchmetrics.image.fid import FrechetInceptionDistance

from fastgan import InputError, load_images
from fastgan.metrics import features as features_module
from fastgan.metrics import quality as quality_module
from fastgan.metrics import reference as reference_module
from fastgan.metrics.features import Features, feature_names, load_features, register_features
from fastgan.metrics.neighbours import find_copies, nearest_real, neighbours_grid
from fastgan.metrics.quality import frechet_distance, kernel_distance, measure, overlap
from fastgan.metrics.reference import Moments, image_batches, neighbour_radii, real_statistics


def conv_net(nc=1, seed=3):
    """A small network of random weights: enough to tell images apart."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(nc, 16, 5, 2), nn.ReLU(), nn.Conv2d(16, 24, 3, 2), nn.ReLU(), nn.AvgPool2d(2)
        )


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    cache = tmp_path_factory.mktemp("digits")
    data = load_images("digits", 32, cache_dir=cache)
    some = np.random.default_rng(0).permutation(len(data))[:1200]
    return dataclasses.replace(
        data, images=data.images[some], labels=data.labels[some], digest="of 1200 digits"
    )


@pytest.fixture(scope="module")
def net():
    return Features(conv_net(), "random")


def moments(x):
    found = Moments.zero(x.shape[1])
    for part in x.split(37):
        found.add(part)
    return found


def gaussians(n, size, seed, scale=1.0, shift=0.0):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(n, size, generator=draw, dtype=torch.float64) * scale + shift


def two_sets(n=500, m=400, size=24):
    """Vectors as networks give them: far from the origin, of very different deviations."""
    deviations = torch.logspace(0, -2, size).double()
    x = gaussians(n, size, 1) * deviations + 3.0
    y = gaussians(m, size, 2) * deviations * 1.1 + 3.0 + 0.3 * deviations
    return x.float(), y.float()


def test_frechet_is_the_others():
    x, y = two_sets()
    found = frechet_distance(moments(x), moments(y))
    statistics = [fid_features_to_statistics(z.double()) for z in (x, y)]
    fidelity = fid_statistics_to_metric(*statistics, verbose=False)
    assert found == pytest.approx(fidelity["frechet_inception_distance"], rel=1e-6)
    identity = nn.Identity()
    identity.num_features = x.shape[1]
    theirs = FrechetInceptionDistance(identity)
    theirs.update(x, real=True)
    theirs.update(y, real=False)
    assert found == pytest.approx(theirs.compute().item(), rel=1e-3)


@pytest.mark.parametrize("n, m", [(20, 20), (20, 90), (300, 30)])
def test_frechet_of_fewer_vectors_than_dimensions(n, m):
    """Held to the same distance from the vectors, whose products are not squared first."""
    deviations = torch.logspace(0, -4, 160).double()
    x, y = gaussians(n, 160, 1) * deviations, gaussians(m, 160, 2) * deviations * 1.1
    roots = [(z - z.mean(0)) / math.sqrt(len(z) - 1) for z in (x, y)]
    want = (x.mean(0) - y.mean(0)).square().sum() + sum(r.square().sum() for r in roots)
    want -= 2.0 * torch.linalg.svdvals(roots[0] @ roots[1].T).sum()
    assert frechet_distance(moments(x), moments(y)) == pytest.approx(want.item(), rel=1e-9)
    shifted = frechet_distance(moments(x), moments(x + 1e-3))
    assert shifted == pytest.approx(160 * 1e-6, rel=1e-6)
    assert frechet_distance(moments(x), moments(x)) < 1e-9


def test_moments_far_from_the_origin():
    x = gaussians(200, 5, 1, scale=1e-3, shift=1e5)
    found = moments(x)
    assert found.n == 200
    torch.testing.assert_close(found.mean, x.mean(0))
    torch.testing.assert_close(found.covariance, torch.cov(x.T), rtol=1e-6, atol=1e-15)


def test_precision_and_recall_are_the_others(monkeypatch):
    monkeypatch.setattr(quality_module, "_ROWS", 64)
    monkeypatch.setattr(reference_module, "_ROWS", 64)
    x, y = two_sets()
    found = overlap(x, y)
    settings = {"prc_neighborhood": 3, "prc_batch_size": 1000, "verbose": False}
    theirs = prc_features_to_metric(y.double(), x.double(), save_cpu_ram=False, **settings)
    assert found.precision == pytest.approx(theirs["precision"], rel=1e-3)
    assert found.recall == pytest.approx(theirs["recall"], rel=1e-3)
    assert 0.2 < found.precision < 1.0 and found.recall != found.precision


def test_density_and_coverage_are_their_definition():
    x, y = two_sets(90, 70)
    between = torch.cdist(x.double(), y.double())
    radii = torch.cdist(x.double(), x.double()).sort().values[:, 5:6]
    found = overlap(x, y)
    assert found.density == pytest.approx((between < radii).sum().item() / (5 * 70))
    assert found.coverage == pytest.approx((between < radii).any(1).double().mean().item())


def test_kernel_distance_is_the_others():
    x, y = two_sets(1000, 1200)
    found, error = kernel_distance(x, y)
    settings = {"kid_kernel": "poly", "kid_kernel_poly_degree": 3, "kid_kernel_poly_coef0": 1}
    blocks = [
        kid_features_to_metric(
            *(z[i : i + 250].double() for z in (x, y)),
            kid_subsets=1,
            kid_subset_size=250,
            kid_kernel_poly_gamma=None,
            rng_seed=0,
            verbose=False,
            **settings,
        )["kernel_inception_distance_mean"]
        for i in range(0, 1000, 250)
    ]
    assert found == pytest.approx(np.mean(blocks), rel=1e-6)
    assert error == pytest.approx(np.std(blocks, ddof=1) / 2, rel=1e-6)


def test_kernel_error_covers_repeats(monkeypatch):
    """Two standard errors hold the truth in 92 % of repeats, as Student's t with 9 degrees says.

    The truth is exact: E (x.y / F + 1)^3 = c^3 + 3 c v + s, by the mean c, variance v and third
    central moment s of x.y / F + 1, of normal x and y with unit variances.
    """
    monkeypatch.setattr(quality_module, "_BLOCK", 40)
    size, shift, repeats = 8, 0.3, 200

    def expected_kernel(a, b):
        # The moments of one coordinate's product, of means a and b; the central ones add up.
        mean, second = a * b, (1 + a * a) * (1 + b * b)
        third = (a**3 + 3 * a) * (b**3 + 3 * b)
        variance = second - mean**2
        skew = third - 3 * mean * second + 2 * mean**3
        c, v, s = mean + 1, variance / size, skew / size**2
        return c**3 + 3 * c * v + s

    truth = expected_kernel(0, 0) + expected_kernel(shift, shift) - 2 * expected_kernel(0, shift)
    inside, estimates = 0, []
    for i in range(repeats):
        x, y = gaussians(400, size, 2 * i), gaussians(400, size, 2 * i + 1, shift=shift)
        estimate, error = kernel_distance(x, y)
        inside += abs(estimate - truth) <= 2 * error
        estimates.append(estimate)
    assert 0.85 * repeats <= inside < repeats
    of_mean = np.std(estimates) / math.sqrt(repeats)
    assert np.mean(estimates) == pytest.approx(truth, abs=3 * of_mean)


def test_features_leave_what_they_take_alone(digits):
    module = conv_net()
    module.append(nn.Flatten()).append(nn.BatchNorm1d(24 * 9)).append(nn.Dropout())
    before = {name: value.clone() for name, value in module.state_dict().items()}
    images = next(image_batches(digits))
    state = torch.get_rng_state()
    features = load_features(module)
    want = features(images)
    assert torch.equal(torch.get_rng_state(), state)
    assert module.training and all(p.requires_grad for p in module.parameters())
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert want.shape == (len(images), 216) and want.dtype == torch.float32
    assert not want.requires_grad and features.size == 216
    nn.init.zeros_(module[0].weight)
    torch.testing.assert_close(features(images), want)
    assert load_features(module).identity != features.identity
    assert load_features(conv_net(seed=4)).identity != load_features(conv_net()).identity
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(features(images.double()), want)


def test_features_round_as_files_do_and_make_grey_rgb(digits):
    images = next(image_batches(digits))[:40]
    rgb = Features(conv_net(3))
    want = rgb(images)
    torch.testing.assert_close(rgb(images.expand(-1, 3, -1, -1) + 0.3 / 127.5), want)
    torch.testing.assert_close(want, rgb._network(images.expand(-1, 3, -1, -1)).mean((2, 3)))


def test_features_refuse(digits, net):
    images = next(image_batches(digits))[:4]
    with pytest.raises(
        InputError, match="features='no-such' are unknown; choose from classifier, efficientn"
    ):
        load_features("no-such")
    with pytest.raises(InputError, match="images of 1 channels, these have 3"):
        net(images.expand(-1, 3, -1, -1))
    with pytest.raises(InputError, match="has diverged"):
        net(torch.where(images > 0.9, torch.inf, images))
    with pytest.raises(InputError, match=r"torch\.uint8 of shape"):
        net(images.byte())
    with pytest.raises(InputError, match=r"returned \(4, 1, 1024\)"):
        load_features(nn.Flatten(2))(images)


def test_registered_features(digits, monkeypatch):
    monkeypatch.setattr(features_module, "_builders", dict(features_module._builders))
    asked = []

    def build(data, cache_dir):
        asked.append((data, cache_dir))
        return conv_net()

    register_features("mine", build)
    register_features("mine", build)
    assert "mine" in feature_names()
    assert load_features("mine", data=digits, cache_dir="here").name == "mine"
    assert asked[0][0] is digits and str(asked[0][1]) == "here"
    with pytest.raises(InputError, match="'mine' are registered already"):
        register_features("mine", lambda data, cache_dir: conv_net())


def test_efficientnet_tells_digits_from_noise(digits):
    features = load_features("efficientnet-lite0")
    images = next(image_batches(digits))[:12]
    noise = torch.rand(6, 1, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    x = features(torch.cat([images, noise]))
    assert x.shape == (18, 1280) == (18, features.size)
    own = torch.cdist(x, x).fill_diagonal_(torch.inf)
    assert own[:12, :12].min(1).values.max() < own[:12, 12:].min()
    # What the network's published code (efficientnet-lite-pytorch 0.1.0) gives in float64 of these.
    assert x[:12].norm(dim=1).mean().item() == pytest.approx(15.6630, rel=1e-4)
    assert x[0, 900].item() == pytest.approx(4.5693, rel=1e-4)


@pytest.fixture
def inception_weights(monkeypatch):
    """As the published file, of random weights; its checksum is known."""
    network = fidelity_inception.FeatureExtractorInceptionV3
    with torch.random.fork_rng(), monkeypatch.context() as patch:
        patch.setattr(network, "load_state_dict", lambda self, state: None)
        empty = io.BytesIO()
        torch.save({}, empty)
        empty.seek(0)
        made = network("inception-v3-compat", ["2048"], feature_extractor_weights_path=empty)
    file = io.BytesIO()
    torch.save(made.state_dict(), file)
    monkeypatch.setattr(
        features_module, "INCEPTION_SHA256", hashlib.sha256(file.getvalue()).hexdigest()
    )
    return file.getvalue(), made


def test_inception_is_downloaded_once(tmp_path, monkeypatch, inception_weights, digits):
    weights, published = inception_weights
    monkeypatch.setattr(features_module, "_download", lambda url: weights)
    state = torch.get_rng_state()
    features = load_features("inception", cache_dir=tmp_path / "new")
    assert torch.equal(torch.get_rng_state(), state)
    (path,) = (tmp_path / "new").iterdir()
    assert path.read_bytes() == weights and features_module.INCEPTION_URL.endswith(path.name)
    monkeypatch.setattr(features_module, "_download", None)
    load_features("inception", cache_dir=tmp_path / "new")
    images = next(image_batches(digits))[:2]
    pixels = torch.from_numpy(digits.images[:2]).permute(0, 3, 1, 2).expand(-1, 3, -1, -1)
    torch.testing.assert_close(features(images), published(pixels)[0])


def test_inception_without_its_weights(tmp_path, monkeypatch):
    assert fidelity_inception.URL_INCEPTION_V3 == features_module.INCEPTION_URL
    # torch.hub's convention: the name ends in how the SHA-256 begins.
    assert features_module.INCEPTION_SHA256[:8] in features_module.INCEPTION_URL

    def offline(url, timeout):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(features_module.urllib.request, "urlopen", offline)
    with pytest.raises(InputError) as refused:
        load_features("inception", cache_dir=tmp_path)
    for part in ("Name or service", features_module.INCEPTION_URL, str(tmp_path), "--features"):
        assert part in str(refused.value)
    assert "\n" not in str(refused.value)

    class Response(io.BytesIO):
        headers = {"Content-Length": "9"}  # noqa: RUF012

    def answering(data):
        return lambda url, timeout: Response(data)

    monkeypatch.setattr(features_module.urllib.request, "urlopen", answering(b"half"))
    with pytest.raises(InputError, match="broke off after 4 of 9 bytes"):
        load_features("inception", cache_dir=tmp_path)
    monkeypatch.setattr(features_module.urllib.request, "urlopen", answering(b"not those"))
    with pytest.raises(InputError, match=r"https.* is damaged, its SHA-256 is d0df"):
        load_features("inception", cache_dir=tmp_path)
    assert not list(tmp_path.iterdir())
    (tmp_path / features_module.INCEPTION_URL.rpartition("/")[2]).write_bytes(b"not those")
    with pytest.raises(InputError, match=f"{tmp_path}.* is damaged"):
        load_features("inception", cache_dir=tmp_path)


def test_figures_follow_what_is_done_to_images(digits, net):
    real = real_statistics(digits, net, progress=False)
    images = torch.cat(list(image_batches(digits)))

    def quality(changed):
        return measure(changed.split(100), len(images), real, net)

    same = quality(images)
    assert same.frechet < 1e-9 and same.kernel < 2 * same.kernel_error
    assert same.precision == same.recall == same.coverage == 1.0
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    blur = torch.ones(1, 1, 3, 3) / 9
    flat = images.mean((2, 3), keepdim=True).expand_as(images)
    for worse in (
        [images + scale * noise for scale in (0.1, 0.3, 0.9)],
        [F.conv2d(images, blur, padding=1), F.avg_pool2d(images, 7, 1, 3), flat],
    ):
        found = [same, *map(quality, worse)]
        for less, more in itertools.pairwise(found):
            assert more.frechet > less.frechet and more.kernel > less.kernel
        assert found[-1].coverage < 0.1 < found[1].coverage
    one_class = quality(
        images[torch.from_numpy(digits.labels == 1).nonzero()[:, 0]].repeat(12, 1, 1, 1)
    )
    assert one_class.precision == 1.0 and one_class.recall < 0.4 and one_class.coverage < 0.4


def test_streaming_is_one_batch(digits, net):
    images = torch.cat(list(image_batches(digits)))[:528]
    real = real_statistics(digits, net, n=600, kept=200, progress=False)
    assert len(real.rows) == 200 and real.moments.n == 600
    one = measure([images[:500]], 500, real, net, kept=150)

    def endless():
        yield from images.split(33)
        raise AssertionError("asked for more than n")

    streamed = measure(endless(), 500, real, net, kept=150)
    for name, value in one.to_dict().items():
        if isinstance(value, float):
            assert getattr(streamed, name) == pytest.approx(value, rel=1e-4), name
        else:
            assert getattr(streamed, name) == value
    assert (one.kept_real, one.kept_fake) == (200, 150)
    text = one.describe()
    for part in ("500 samples", "600 images", "150 against 200", "random features", "digits"):
        assert part in text
    assert json.loads(json.dumps(one.to_dict()))["frechet"] == one.frechet


def test_rows_are_those_of_their_images(digits, net):
    real = real_statistics(digits, net, n=300, kept=100, progress=False)
    want = torch.cat([net(batch) for batch in image_batches(digits, real.index)])
    torch.testing.assert_close(real.rows, want)
    assert len(real.index.unique()) == 100 and not torch.equal(real.index, real.index.sort().values)
    other = real_statistics(digits, net, n=300, kept=100, seed=1, progress=False)
    assert not torch.equal(other.index, real.index)
    radii = torch.cdist(want.double(), want.double()).sort().values
    torch.testing.assert_close(real.precision_radii.double(), radii[:, 3], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(real.coverage_radii.double(), radii[:, 5], rtol=1e-3, atol=1e-4)
    assert neighbour_radii(want, (5,))[0].equal(real.coverage_radii)


class Largest(TorchDispatchMode):
    """Notes the most elements that a floating tensor has had."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.is_floating_point():
                self.elements = max(self.elements, x.numel())
        return out


def test_memory_does_not_grow_with_the_images(digits):
    """One float a pixel, so that vectors of all the images would be the largest tensor."""
    features = Features(nn.Flatten(), "pixels")
    small = dataclasses.replace(digits, images=digits.images[:, :8, :8], digest="small")
    batches = [batch[i : i + 50] for batch in image_batches(small) for i in range(0, 250, 50)]
    found = []
    for n in (300, 1000):
        with Largest() as largest:
            real = real_statistics(small, features, n=n, kept=50, progress=False)
            measure(batches, n, real, features, kept=40)
        found.append(largest.elements)
    assert found[0] == found[1] < 1000 * 64


def test_statistics_come_from_the_cache(digits, tmp_path, monkeypatch, caplog):
    computed = []
    compute = reference_module._compute

    def counted(*args):
        computed.append(args)
        return compute(*args)

    monkeypatch.setattr(reference_module, "_compute", counted)

    def get(network=None, **settings):
        features = Features(network or conv_net())
        settings = {"n": 64, "kept": 32, "cache_dir": tmp_path, "progress": False, **settings}
        return real_statistics(digits, features, **settings)

    first, again = get(), get()
    assert len(computed) == 1
    for field in ("rows", "index", "precision_radii", "coverage_radii"):
        assert torch.equal(getattr(first, field), getattr(again, field))
    assert torch.equal(first.moments.scatter, again.moments.scatter)
    (path,) = tmp_path.iterdir()
    get(conv_net(seed=4)), get(n=65), get(kept=33), get(seed=1)
    assert len(computed) == 5
    whole = path.read_bytes()
    middle = len(whole) // 2
    damaged = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    for i, content in enumerate((damaged, whole[:-5], b"")):
        path.write_bytes(content)
        get()
        assert len(computed) == 6 + i and path.read_bytes() == whole
    assert len(caplog.messages) == 3 and str(path) in caplog.text


def test_statistics_where_nothing_can_be_written(digits, net, tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    real = real_statistics(digits, net, n=40, cache_dir=tmp_path / "file", progress=False)
    assert real.moments.n == 40 and "cannot be written" in caplog.text


def test_quality_refuses(digits, net):
    real = real_statistics(digits, net, n=40, progress=False)
    images = next(image_batches(digits))
    with pytest.raises(InputError, match="n=7 samples must be at least 8"):
        measure([images], 7, real, net)
    with pytest.raises(InputError, match="hold 256 images, n=300"):
        measure([images], 300, real, net)
    with pytest.raises(InputError, match="kept=5 must be at least 8"):
        measure([images], 20, real, net, kept=5)
    with pytest.raises(InputError, match="are others than those of the real set"):
        measure([images], 20, real, Features(conv_net(seed=4)))
    with pytest.raises(InputError, match="n=1201 real images: at least 8 and at most the 1200"):
        real_statistics(digits, net, n=1201)


def test_planted_copies_are_found(digits, net):
    """Of 40 samples 10 are training images, changed a little; the others are held out."""
    held_out = dataclasses.replace(digits, images=digits.images[1000:], labels=None)
    train = dataclasses.replace(digits, images=digits.images[:1000], labels=None)
    noise = torch.randn(10, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    source = torch.arange(50, 60)
    planted = torch.cat(list(image_batches(train, source))) + 0.01 * noise
    images = torch.cat([next(image_batches(held_out))[:30], planted])
    copies = find_copies(images, train, net, k=2)
    assert copies.indices.shape == (40, 2)
    assert copies.indices[30:, 0].tolist() == source.tolist()
    assert copies.suspected[30:].all() and copies.suspected[:30].sum() <= 3
    assert set(copies.order[:10].tolist()) == set(range(30, 40))
    assert copies.rate == copies.suspected.sum().item() / 40
    assert (
        "images of embedded set digits" in copies.describe()
        and copies.to_dict()["copy_rate"] == copies.rate
    )
    indices, distances = nearest_real(images, train, net, k=2)
    assert torch.equal(indices, copies.indices)
    torch.testing.assert_close(distances, copies.distances)
    direct = torch.cdist(net(images).double(), net(torch.cat(list(image_batches(train)))).double())
    torch.testing.assert_close(distances, direct.sort().values[:, :2], rtol=1e-4, atol=1e-5)

    real = real_statistics(train, net, progress=False)
    kept = find_copies(images, train, net, real=real, k=2)
    assert torch.equal(kept.indices, indices)
    fewer = real_statistics(train, net, kept=500, progress=False)
    some = find_copies(images, train, net, real=fewer, k=2)
    assert some.n_real == some.n_compared == 500 and torch.isin(some.indices, fewer.index).all()
    assert some.suspected[30:].tolist() == torch.isin(source, fewer.index).tolist()
    with pytest.raises(InputError, match="real: the statistics are of"):
        find_copies(images, train, Features(conv_net(seed=4)), real=real)

    grid = neighbours_grid(images, train, copies, rows=3)
    assert grid.shape == (9, 1, 32, 32)
    for row, sample in zip(grid.split(3), copies.order, strict=False):
        assert torch.equal(row[0], images[sample])
        beside = torch.cat(list(image_batches(train, copies.indices[sample])))
        assert torch.equal(row[1:], beside)


def test_images_as_new_as_the_training_set_are_suspected_as_rarely_as_stated(digits, net):
    train = dataclasses.replace(digits, images=digits.images[:900], labels=None)
    held_out = dataclasses.replace(digits, images=digits.images[900:], labels=None)
    images = torch.cat(list(image_batches(held_out)))
    assert find_copies(images, train, net).rate <= 0.04


def test_neighbours_refuse(digits, net):
    images = next(image_batches(digits))[:4]
    with pytest.raises(InputError, match="k=0 must be from 1 to 1199"):
        nearest_real(images, digits, net, k=0)
    copies = find_copies(images, digits, net, k=1)
    assert copies.suspected.all()
    with pytest.raises(InputError, match="load the set with the size"):
        neighbours_grid(images[:, :, :16], digits, copies)
