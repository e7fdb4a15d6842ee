"""From a set of uint8 images to a batch for the networks: gather, flip, scale.

y[i, c, h, w] = images[index[i], h, w', c] / 127.5 - 1,   w' = W-1-w where flip[i] else w
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastgan import gpu
from fastgan.gpu import empty_images
from fastgan.ops import cpp, cuda, triton
from fastgan.ops.backend import fastest_backend, select_backend


def augment_reference(
    images: Tensor, index: Tensor | None, flip: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The formula above in torch. Arguments as in :func:`augment`."""
    batch = images if index is None else images[index]
    if flip is not None:
        batch = torch.where(flip[:, None, None, None], batch.flip(2), batch)
    return batch.to(dtype).div_(127.5).sub_(1.0).permute(0, 3, 1, 2)


@torch.library.custom_op("fastgan::augment_forward", mutates_args=())
def augment_forward(
    images: Tensor, index: Tensor | None, flip: Tensor | None, dtype: torch.dtype, backend: str
) -> Tensor:
    """The formula above. Arguments as in :func:`augment`; ``backend`` may be ``auto``."""
    m, h, w, c = images.shape
    n = m if index is None else len(index)
    given = images.contiguous(), cpp.contiguous(index), cpp.contiguous(flip)

    def run(backend: str) -> Tensor:
        out = empty_images(images, n, c, h, w, dtype=dtype)
        if backend == "triton":
            triton.kernels("augment").augment_forward(*given, out)
        else:
            cuda.launch("augment_forward", *map(cuda.aligned, given), out)
        return out

    key = f"n{n} {h}x{w}x{c} {dtype} index {index is not None} flip {flip is not None}"
    return run(fastest_backend(backend, "augment", key, run, images, index, flip))


@augment_forward.register_fake
def _(
    images: Tensor, index: Tensor | None, flip: Tensor | None, dtype: torch.dtype, backend: str
) -> Tensor:
    m, h, w, c = images.shape
    n = m if index is None else index.shape[0]
    return cpp.fake_images(images, n, c, h, w, dtype)


def augment(
    images: Tensor,
    index: Tensor | None = None,
    flip: Tensor | None = None,
    *,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Gather images by index, mirror some of them, and scale their bytes to [-1, 1].

    Args:
        images: ``[M, H, W, C]`` uint8.
        index: ``[N]`` int64 on the same device, each in 0..M-1; None takes all in order.
        flip: ``[N]`` bool on the same device; None flips none.
        dtype: of the result, floating.

    Returns:
        ``[N, C, H, W]`` in ``torch.channels_last`` memory format.

    Raises:
        NotBuiltError: a backend was asked for by name that cannot take these tensors.

    Equivalent to::

        x = images[index].permute(0, 3, 1, 2)
        torch.where(flip[:, None, None, None], x.flip(3), x).to(dtype) / 127.5 - 1
    """
    backend = "reference"
    if images.dtype == torch.uint8 and dtype in gpu.DTYPES and images.ndim == 4:
        backend = select_backend("augment", images, index, flip)
    if backend == "reference":
        return augment_reference(images, index, flip, dtype)
    return augment_forward(images, index, flip, dtype, backend)
