"""The kernels of ``cuda_on_host/toy.cu``, which the tests of the emulator run."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from support import cuda_host

SOURCE = Path("tests", "support", "cuda_on_host", "toy.cu")


def build_toys(sanitizer: cuda_host.Sanitizer | None = None) -> Path:
    return cuda_host.build("toys", [SOURCE], sanitizer, includes=[cuda_host.KERNELS])


class Toys:
    """The kernels of a build; ``library`` is what :mod:`support.cuda_host` calls a module."""

    def __init__(self, path: Path | str) -> None:
        self.library = ctypes.CDLL(str(path))
        self.library.toy_error_name.restype = ctypes.c_char_p

    def launch(
        self,
        kernel: str,
        x: np.ndarray,
        y: np.ndarray,
        *,
        grid: Sequence[int] = (1, 1, 1),
        block: Sequence[int] = (32, 1, 1),
        shared: int = 0,
    ) -> str:
        """The name of the launch's error.

        Raises:
            RuntimeError: the emulator refuses what the kernel does.
        """
        message = ctypes.create_string_buffer(1000)
        error = self.library.toy_launch(
            kernel.encode(),
            ctypes.c_void_p(x.ctypes.data),
            ctypes.c_void_p(y.ctypes.data),
            ctypes.c_int(x.size),
            (ctypes.c_uint * 3)(*grid),
            (ctypes.c_uint * 3)(*block),
            ctypes.c_size_t(shared),
            message,
            ctypes.c_size_t(len(message)),
        )
        if error == -1:
            raise RuntimeError(message.value.decode())
        assert error >= 0, f"there is no kernel {kernel}"
        return str(self.library.toy_error_name(error).decode())


def numbers(count: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(count).astype(np.float32)


def run(path: str, kernel: str, size: str, grid: str, threads: str, floats: str = "1") -> None:
    """A kernel on ``size`` numbers, with ``floats`` of shared memory a thread, in each order."""
    toys, x = Toys(path), numbers(int(size))
    for order in cuda_host.ORDERS:
        with cuda_host.order(toys.library, order):
            _launch(toys, kernel, x, int(grid), int(threads), int(floats))


def run_right_ones(path: str) -> None:
    """Kernels that break no rule, twice in each order, the second reading what the first wrote."""
    toys, x = Toys(path), numbers(512)
    kernels = [
        *((kernel, 4, 128, 1) for kernel in ("turn<true>", "add<32, true>", "neighbour<true>")),
        *(("ballot", 4, 128, 1), ("halves", 4, 128, 1), ("leaves_copies", 4, 128, 1)),
        *(("pipeline<2, 1, kNothing>", 1, 64, 2), ("pipeline<3, 2, kNothing>", 1, 64, 6)),
        *(("pipeline<4, 4, kNothing>", 1, 32, 16), ("matrices<true, true>", 1, 32, 4)),
        *((f"products<{t}>", 1, 32, 0) for t in ("__nv_bfloat16", "__half", "float")),
    ]
    for order in cuda_host.ORDERS:
        with cuda_host.order(toys.library, order):
            for kernel, *shape in kernels:
                _launch(toys, kernel, _launch(toys, kernel, x, *shape), *shape)
    # A launch that is given up halfway leaves nothing behind.
    for kernel in ("some_at_barrier", "returned_lane", "copies_to_global", "matrices_without_lane"):
        with contextlib.suppress(RuntimeError):
            _launch(toys, kernel, x, 1, 128)
            raise AssertionError(f"{kernel} was not refused")
        _launch(toys, "turn<true>", x, 4, 128)


def _launch(
    toys: Toys, kernel: str, x: np.ndarray, grid: int, threads: int, floats: int = 1
) -> np.ndarray:
    y = np.zeros_like(x)
    shape = {"grid": (grid, 1, 1), "block": (threads, 1, 1), "shared": 4 * floats * threads}
    assert toys.launch(kernel, x, y, **shape) == "cudaSuccess"
    return y
