"""The memory that executed PTX reads and writes: given buffers, and banks that start poisoned."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

U8, U16, U32, U64 = (np.dtype(f"u{size}") for size in (1, 2, 4, 8))
PRED = np.dtype(bool)

# All bits set: NaN as a floating-point number of any width, -1 as an integer, far outside of
# every buffer as an address.
POISON = 0xFF


class PtxError(AssertionError):
    """What a GPU would have got wrong or refused, and what cannot be executed here."""


class Region:
    """Bytes from an address on, also seen as aligned elements of any size."""

    def __init__(self, base: int, data: np.ndarray):
        self.base = base
        self.end = base + data.size
        self._data = data
        self._elements: dict[np.dtype, tuple[np.ndarray, np.ndarray]] = {}

    def read(self, addresses: np.ndarray, dtype: np.dtype, count: int) -> np.ndarray:
        """``[count, lanes]``: as many neighbouring elements from each address on."""
        elements, index = self._places(addresses, dtype, count)
        return elements[index]

    def write(self, addresses: np.ndarray, values: np.ndarray) -> None:
        """Writes what :meth:`read` would return; of two lanes at one place the later wins."""
        elements, index = self._places(addresses, values.dtype, len(values))
        if not elements.flags.writeable:
            raise PtxError("writes to memory that may only be read")
        elements[index] = values

    def _places(
        self, addresses: np.ndarray, dtype: np.dtype, count: int
    ) -> tuple[np.ndarray, np.ndarray]:
        found = self._elements.get(dtype)
        if found is None:
            # The base need not be aligned, the accesses are: elements begin after the odd bytes.
            skipped = -self.base % dtype.itemsize
            whole = max(self._data.size - skipped, 0) // dtype.itemsize * dtype.itemsize
            first = np.array([self.base + skipped], U64)
            found = first, self._data[skipped : skipped + whole].view(dtype)
            self._elements[dtype] = found
        first, elements = found
        index = ((addresses - first) // U64.type(dtype.itemsize)).view(np.int64)
        return elements, index + np.arange(count)[:, None]


class GlobalMemory:
    """The buffers that a launch was given, and nothing else."""

    def __init__(self, regions: Iterable[Region]):
        self._regions = list(regions)

    def read(
        self, addresses: np.ndarray, owners: np.ndarray, dtype: np.dtype, count: int
    ) -> np.ndarray:
        """``[count, lanes]``; of ``owners`` all see the same memory."""
        values = None
        for region, lanes in self._parts(addresses, dtype.itemsize * count):
            if lanes is None:
                return region.read(addresses, dtype, count)
            if values is None:
                values = np.zeros((count, addresses.size), dtype)
            values[:, lanes] = region.read(addresses[lanes], dtype, count)
        return values

    def write(self, addresses: np.ndarray, owners: np.ndarray, values: np.ndarray) -> None:
        for region, lanes in self._parts(addresses, values.itemsize * len(values)):
            if lanes is None:
                region.write(addresses, values)
            else:
                region.write(addresses[lanes], values[:, lanes])

    def _parts(
        self, addresses: np.ndarray, size: int
    ) -> Iterator[tuple[Region, np.ndarray | None]]:
        """The regions that accesses of ``size`` bytes lie in, with the lanes; None means all."""
        check_aligned(addresses, size)
        low, high = int(addresses.min()), int(addresses.max()) + size
        for region in self._regions:
            if region.base <= low and high <= region.end:
                yield region, None
                return
        outside = np.ones(addresses.size, bool)
        parts = []
        for region in self._regions:
            last = region.end - size
            if last >= region.base:
                inside = outside & (addresses >= U64.type(region.base))
                inside &= addresses <= U64.type(last)
                if inside.any():
                    outside &= ~inside
                    parts.append((region, inside))
        if outside.any():
            raise PtxError(
                f"out of bounds: {outside.sum()} lanes access {size} bytes in no buffer, "
                f"first at {addresses[outside][0]:#x}"
            )
        yield from parts


class Banks:
    """Poisoned memory for each of several owners, from address 0 on: shared and local memory."""

    def __init__(self, owners: int, size: int):
        self._size = size
        # What is aligned in a bank is aligned in the region.
        self.stride = -(-size // 16) * 16
        self._region = Region(0, np.full(owners * self.stride, POISON, np.uint8))

    def read(
        self, addresses: np.ndarray, owners: np.ndarray, dtype: np.dtype, count: int
    ) -> np.ndarray:
        """``[count, lanes]``, each lane from the bank of its owner."""
        places = self.places(addresses, owners, dtype.itemsize * count)
        return self._region.read(places, dtype, count)

    def write(self, addresses: np.ndarray, owners: np.ndarray, values: np.ndarray) -> None:
        self.write_at(self.places(addresses, owners, values.itemsize * len(values)), values)

    def places(self, addresses: np.ndarray, owners: np.ndarray, size: int) -> np.ndarray:
        """Where the bytes lie among those of all owners; what :meth:`write_at` takes."""
        check_aligned(addresses, size)
        # An address may be so high that it wraps when the size is added.
        inside = addresses <= U64.type(max(self._size - size, 0))
        if size > self._size or not inside.all():
            raise PtxError(
                f"out of bounds: {(~inside).sum()} lanes access {size} bytes outside of the "
                f"{self._size} bytes of shared or local memory, up to {int(addresses.max()):#x}"
            )
        return addresses + owners * U64.type(self.stride)

    def write_at(self, places: np.ndarray, values: np.ndarray) -> None:
        self._region.write(places, values)


def check_aligned(addresses: np.ndarray, size: int) -> None:
    """Raises unless every address is a multiple of the bytes accessed, as the hardware does."""
    odd = addresses & U64.type(size - 1)
    if odd.any():
        first = addresses[odd != 0][0]
        raise PtxError(f"misaligned: an access of {size} bytes at {first:#x}")
