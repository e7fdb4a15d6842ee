"""What is measured: the cells, the variants, and the work that a step counts as.

Free of torch, so that wrong arguments are refused at once.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

from fastgan.choices import Backend, Capture, Precision
from fastgan.errors import InputError
from fastgan.nn.sizes import split_size

NZ = 100


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How one variant takes the step.

    Attributes:
        kind: ``example``, ``compile`` or ``fastgan``.
        channels_last: whether the example's networks and images are in that format.
        amp: whether the networks run under ``torch.autocast`` to bfloat16.
        mode: of ``torch.compile``.
        backend, precision, capture: of the engine.
        devices: the types of device that it is measured on; empty for all.
        why: where that is not all, why not on the others.
    """

    kind: str
    channels_last: bool = False
    amp: bool = False
    mode: str = "default"
    backend: Backend = "auto"
    precision: Precision = "fp32"
    capture: Capture = "auto"
    devices: tuple[str, ...] = ()
    why: str = ""

    @property
    def low_precision(self) -> bool:
        """Whether it computes in bfloat16 or float16."""
        return self.amp or self.precision in ("bf16", "fp16")

    def obstacle(self, device_type: str) -> str:
        """Why it is not measured on such a device; empty where it is."""
        if not self.devices or device_type in self.devices:
            return ""
        return f"it is for {' and '.join(self.devices)}, the device is {device_type}: {self.why}"


_ON_GPUS: dict[str, Any] = {"channels_last": True, "devices": ("cuda",)}
# By name, in the order of their turns.
VARIANTS: dict[str, Recipe] = {
    "example": Recipe("example"),
    "example channels_last": Recipe("example", channels_last=True),
    "example amp": Recipe(
        "example", amp=True, **_ON_GPUS, why="autocast to bfloat16 is for tensor cores"
    ),
    "compile": Recipe(
        "compile", devices=("cpu",), why="tensor cores want channels_last, which is measured there"
    ),
    "compile channels_last": Recipe("compile", channels_last=True),
    "compile reduce-overhead": Recipe(
        "compile", mode="reduce-overhead", **_ON_GPUS, why="what it adds are CUDA graphs"
    ),
    "fastgan reference": Recipe("fastgan", backend="reference"),
    "fastgan cpp": Recipe(
        "fastgan", backend="cpp", devices=("cpu",), why="the C++ kernels run on the CPU"
    ),
    "fastgan triton": Recipe(
        "fastgan", backend="triton", devices=("cuda",), why="the Triton kernels run on a GPU"
    ),
    "fastgan cuda": Recipe(
        "fastgan", backend="cuda", devices=("cuda",), why="the CUDA kernels run on a GPU"
    ),
    "fastgan auto": Recipe("fastgan"),
    "fastgan uncaptured": Recipe(
        "fastgan", capture=False, devices=("cuda",), why="CUDA graphs are captured on a GPU"
    ),
    "fastgan bf16": Recipe(
        "fastgan", precision="bf16", devices=("cuda",), why="bfloat16 is for tensor cores"
    ),
}
# What fastgan is compared with; the first is the truth of the check.
OTHERS = tuple(name for name, recipe in VARIANTS.items() if recipe.kind != "fastgan")

COUNT = (
    "direct convolutions of the example's step, 2 FLOP a multiply-add, the same count for every "
    "variant: G once and D three times forward, weight gradient, input gradient (not that of z, "
    "and that of the images only in G's update)"
)


@dataclasses.dataclass(frozen=True)
class Cell:
    """One workload: DCGAN networks, and a batch.

    Attributes:
        image_size: side of the images.
        nc: their channels.
        batch_size: images in one step.
        ngf, ndf: channels of the generator's last, the discriminator's first hidden layer.
    """

    image_size: int = 64
    nc: int = 3
    batch_size: int = 64
    ngf: int = 64
    ndf: int = 64

    def check(self) -> None:
        """Refuse values out of range.

        Raises:
            InputError: names the flag, its value and what it takes.
        """
        for name, value in dataclasses.asdict(self).items():
            if value < 1:
                raise InputError(f"--{name.replace('_', '-')} {value} must be at least 1")
        try:
            split_size(self.image_size)
        except InputError as error:
            raise InputError(f"--image-size: {error}") from None

    def step_gflop(self) -> float:
        """GFLOP of one step, counted as :data:`COUNT` says."""
        g, d = self._convolutions(self.ngf, NZ), self._convolutions(self.ndf, 1)
        generator = 3 * sum(g) - g[0]
        discriminator = 9 * sum(d) - 2 * d[-1]
        return self.batch_size * (generator + discriminator) / 1e9

    def _convolutions(self, width: int, inner: int) -> list[int]:
        """FLOP an image of one pass through each convolution, from the innermost to the image.

        A strided convolution and its transpose do the same work: every tap, once for each pixel on
        the low-resolution side.
        """
        s0, k = split_size(self.image_size)
        channels = [*(width << i for i in reversed(range(k))), self.nc]
        return [
            2 * s0**2 * inner * channels[0],
            *(
                2 * (s0 << i) ** 2 * 4**2 * low * high
                for i, (low, high) in enumerate(itertools.pairwise(channels))
            ),
        ]

    def __str__(self) -> str:
        text = f"{self.image_size}x{self.image_size}x{self.nc}, batch {self.batch_size}"
        if (self.ngf, self.ndf) != (Cell.ngf, Cell.ndf):
            text += f", ngf {self.ngf}, ndf {self.ndf}"
        return text


def default_cells(ngf: int, ndf: int) -> list[Cell]:
    """The two cells that stand for the rest."""
    return [Cell(64, 3, 64, ngf, ndf), Cell(28, 1, 128, ngf, ndf)]


def full_grid(ngf: int, ndf: int) -> list[Cell]:
    """Every size, batch and number of channels."""
    grid = itertools.product((28, 32, 64, 128), (1, 3), (16, 64, 128))
    return [Cell(size, nc, batch, ngf, ndf) for size, nc, batch in grid]
