"""Triton's interpreter, made honest: what would fail on a GPU fails under it.

``TRITON_INTERPRET=1`` runs kernels on the CPU through NumPy, and is lenient where a GPU is not. It
reads and writes anywhere, gives 0 for masked lanes, runs the programs of a grid one after another,
and takes bfloat16 for the integers of its bits. While :func:`guarded` (or after :func:`install`):

Numbers
    bfloat16 is computed in float32 and rounded to nearest; ``tl.dot`` sums exact products of half
    precision in float32, reads float32 as the tensor cores do under ``"tf32"`` and ``"tf32x3"``,
    and asks for as large a K as CUDA. Integers of fewer than 64 bits that overflow in ``+``, ``-``
    or ``*`` raise, as do failing ``tl.device_assert``.

Memory
    Masked lanes of a load without ``other`` are NaN, or -1. :class:`KernelMemoryError` is raised by
    an access outside the elements of the tensor argument that its pointer was made of, by a
    misaligned one, by a store of two lanes to one address, and by a race: a program that writes
    what another one has read or written, or reads what another one wrote, in the same launch.
    Atomics may meet each other, but no plain access of another program.

Not seen: what the threads of one program do to each other, order that programs impose on each other
by atomics (``guarded(races=False)`` for kernels that do), pointers read from memory (they are of no
argument, and raise), and the tensor cores' own rounding of sums.

``TRITON_INTERPRET`` must be set before ``triton`` is imported for the first time.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator

import numpy as np
import torch
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import min_dot_size
from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError
from triton.runtime.interpreter import (
    GridExecutor,
    InterpreterBuilder,
    ReduceOps,
    TensorHandle,
    interpreter_builder,
)


class KernelMemoryError(AssertionError):
    """A kernel touched memory in a way that a GPU forbids or leaves undefined."""


@contextlib.contextmanager
def guarded(*, races: bool = True) -> Iterator[None]:
    """Guards the launches within; with ``races=False``, programs may touch the same memory."""
    global _races
    before = _replace(_replacements())
    races, _races = _races, races
    try:
        yield
    finally:
        _races = races
        _replace(before)


def install() -> None:
    """Guards all launches of this process from now on."""
    _replace(_replacements())


# What a pointer was made of stands in its upper bits, which addresses leave alone: the number of
# the tensor argument, from 1. So one that has left its tensor is known even within another.
_TAG_SHIFT = 48
_ADDRESS = np.uint64((1 << _TAG_SHIFT) - 1)

_CONFLICTS = {
    "load": ("store", "atomic"),
    "store": ("store", "load", "atomic"),
    "atomic": ("store", "load"),
}
_DONE = {"load": "loaded", "store": "stored", "atomic": "changed atomically"}
_SEVERAL = np.iinfo(np.int32).max


class _Storage:
    """Which programs have touched the memory that one or more arguments share."""

    def __init__(self, start: int) -> None:
        self.start = start
        self._nbytes = 0
        self._item = 8
        self._programs: dict[str, np.ndarray] = {}

    def add(self, nbytes: int, itemsize: int) -> None:
        """Holds an argument; the smallest element of all is the unit that is kept account of."""
        self._nbytes = max(self._nbytes, nbytes)
        self._item = min(self._item, itemsize)

    def touch(self, offsets: np.ndarray, size: int, kind: str, program: int) -> tuple[str, int]:
        """Notes an access; what it collides with and whose it was, ``("", 0)`` if nothing."""
        items = offsets >> (self._item.bit_length() - 1)
        if size > self._item:
            items = (items[:, None] + np.arange(size // self._item)).ravel()
        for earlier in _CONFLICTS[kind]:
            if earlier in self._programs:
                whose = self._programs[earlier][items]
                others = (whose != 0) & (whose != program)
                if others.any():
                    return earlier, int(whose[others][0])
        if kind not in self._programs:
            # Zeros cost nothing until they are touched.
            self._programs[kind] = np.zeros(self._nbytes // self._item + 1, np.int32)
        noted = self._programs[kind]
        whose = noted[items]
        noted[items] = np.where((whose == 0) | (whose == program), program, _SEVERAL)
        return "", 0


class _Argument:
    """The elements of a tensor argument, by tagged addresses."""

    def __init__(self, tensor: torch.Tensor, tag: int, storage: _Storage) -> None:
        self.tag = tag << _TAG_SHIFT
        self.storage = storage
        self.start = tensor.data_ptr() | self.tag
        itemsize = tensor.element_size()
        pairs = list(zip(tensor.shape, tensor.stride(), strict=True))
        span = 1 + sum((n - 1) * stride for n, stride in pairs) if tensor.numel() else 0
        self.end = self.start + span * itemsize
        self._name = f"{str(tensor.dtype).removeprefix('torch.')} tensor {list(tensor.shape)}"
        if not tensor.is_contiguous():
            self._name += f" of strides {list(tensor.stride())}"
        self._elements = None
        # A tensor that shares elements, as an expanded one does, may be full with fewer of them.
        if span > np.prod([n for n, stride in pairs if stride], dtype=np.int64):
            elements = np.zeros(span, bool)
            strides = tensor.stride()
            np.lib.stride_tricks.as_strided(elements, tensor.shape, strides)[...] = True
            self._elements = np.repeat(elements, itemsize)

    def __str__(self) -> str:
        return self._name

    def holds(self, pointers: np.ndarray, size: int) -> np.ndarray | np.bool_:
        """Whether each access of ``size`` bytes lies in the tensor; one bool if they all do."""
        if self.start <= int(pointers.min()) and int(pointers.max()) + size <= self.end:
            if self._elements is None:
                return np.True_
            first = (pointers - np.uint64(self.start)).astype(np.int64)
            # Elements are aligned, as is the access: its ends tell.
            return self._elements[first] & self._elements[first + (size - 1)]
        within = (pointers >= self.start) & (pointers + np.uint64(size) <= self.end)
        if self._elements is not None and within.any():
            within[within] = self.holds(pointers[within], size)
        return within


class _Launch:
    """One launch of a kernel: its memory, and what its programs have done to it."""

    def __init__(self, kernel: str) -> None:
        self._kernel = kernel
        self._arguments: list[_Argument] = []
        self._storages: dict[int, _Storage] = {}

    def add(self, tensor: torch.Tensor) -> int:
        """The tag of the pointers to an argument."""
        memory = tensor.untyped_storage()
        start = memory.data_ptr()
        storage = self._storages.setdefault(start, _Storage(start))
        storage.add(memory.nbytes(), tensor.element_size())
        self._arguments.append(_Argument(tensor, len(self._arguments) + 1, storage))
        return self._arguments[-1].tag

    def touch(self, pointers: TensorHandle, mask: np.ndarray, kind: str) -> None:
        """An access by the current program; raises if a GPU could do anything else but it."""
        size = _numpy(pointers.get_element_ty()).itemsize
        lanes = pointers.data.ravel()
        if not mask.all():
            lanes = lanes[np.broadcast_to(mask, pointers.data.shape).ravel()]
        if not lanes.size:
            return
        if int(np.bitwise_or.reduce(lanes)) & (size - 1):
            count = np.count_nonzero(lanes & np.uint64(size - 1))
            self._fail(f"misaligned {kind}: {count} of {lanes.size} lanes, not at {size} bytes")
        if kind == "store" and lanes.size > 1:
            ordered = np.sort(lanes & _ADDRESS)
            count = np.count_nonzero(ordered[1:] == ordered[:-1])
            if count:
                self._fail(f"store to duplicate addresses: {count} of {lanes.size} lanes")
        tag = int(lanes[0]) >> _TAG_SHIFT
        if int(lanes.min()) >> _TAG_SHIFT == int(lanes.max()) >> _TAG_SHIFT:
            self._touch_argument(tag, lanes, size, kind)
            return
        tags = lanes >> np.uint64(_TAG_SHIFT)
        for each in np.unique(tags):
            self._touch_argument(int(each), lanes[tags == each], size, kind)

    def _touch_argument(self, tag: int, lanes: np.ndarray, size: int, kind: str) -> None:
        if not 0 < tag <= len(self._arguments):
            self._fail(f"out-of-bounds {kind}: {lanes.size} lanes, by a pointer of no argument")
        argument = self._arguments[tag - 1]
        within = argument.holds(lanes, size)
        if not within.all():
            outside = lanes[~np.broadcast_to(within, lanes.shape)]
            self._fail(
                f"out-of-bounds {kind}: {outside.size} of {lanes.size} lanes, the first at byte "
                f"{int(outside[0]) - argument.start} of {argument.end - argument.start}"
                f" of a {argument}"
            )
        grid = interpreter_builder.grid_dim
        if not _races or grid == (1, 1, 1):
            return
        program = 1 + int(np.ravel_multi_index(interpreter_builder.grid_idx, grid))
        storage = argument.storage
        offsets = (lanes - np.uint64(argument.tag | storage.start)).astype(np.int64)
        earlier, whose = storage.touch(offsets, size, kind, program)
        if earlier:
            several = whose == _SEVERAL
            other = tuple(map(int, np.unravel_index(0 if several else whose - 1, grid)))
            self._fail(
                f"race: {kind} of what {'other programs' if several else f'program {other}'} "
                f"{_DONE[earlier]}, in a {argument}"
            )

    def _fail(self, what: str) -> None:
        raise KernelMemoryError(
            f"kernel {self._kernel}, program {tuple(interpreter_builder.grid_idx)}: {what}"
        )


_races = True
_launch: _Launch | None = None

_original_call = GridExecutor.__call__
_original_convert = interpreter._implicit_cvt
_original_load = InterpreterBuilder.create_masked_load
_original_store = InterpreterBuilder.create_masked_store
_original_atomic_rmw = InterpreterBuilder.create_atomic_rmw
_original_atomic_cas = InterpreterBuilder.create_atomic_cas
_original_dot = InterpreterBuilder.create_dot
_original_cast = InterpreterBuilder.cast_impl
_original_unary = InterpreterBuilder.unary_op
_original_binary = InterpreterBuilder.binary_op
_original_fma = InterpreterBuilder.create_fma
_original_sum = ReduceOps.sum


def _call(executor: GridExecutor, *args: object, **kwargs: object) -> None:
    global _launch
    _launch = _Launch(executor.fn.__name__)
    try:
        _original_call(executor, *args, **kwargs)
    except InterpreterError as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, KernelMemoryError):
            cause = cause.__cause__
        if cause is not None:
            raise cause from None
        raise
    finally:
        _launch = None


def _convert(argument: object) -> object:
    converted = _original_convert(argument)
    if _launch is not None and hasattr(argument, "data_ptr"):
        tag = _launch.add(interpreter._unwrap_tensor(argument))
        converted.handle.data |= np.uint64(tag)
    return converted


def _touched(pointers: TensorHandle, mask: np.ndarray, kind: str) -> TensorHandle:
    """The pointers without their tags, checked."""
    if _launch is None:
        return pointers
    _launch.touch(pointers, mask, kind)
    return TensorHandle(pointers.data & _ADDRESS, pointers.dtype)


def _create_masked_load(
    builder: InterpreterBuilder,
    ptrs: TensorHandle,
    mask: TensorHandle | np.ndarray,
    other: TensorHandle | None,
    *args: object,
    **kwargs: object,
) -> TensorHandle:
    if other is None and not _flags(mask).all():
        element = ptrs.get_element_ty()
        other = TensorHandle(_poison(ptrs.data.shape, _numpy(element)), element)
    ptrs = _touched(ptrs, _flags(mask), "load")
    return _original_load(builder, ptrs, mask, other, *args, **kwargs)


def _flags(mask: TensorHandle | np.ndarray) -> np.ndarray:
    # That of a tensor descriptor is an array itself, and its ``data`` a memoryview. What came of
    # ``&`` between flags of different shapes is of numbers.
    return np.asarray(mask.data).astype(bool, copy=False)


def _poison(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    # All bits set is a NaN in every floating-point format, and -1.
    return np.full(shape, -1, f"i{dtype.itemsize}").view(dtype)


def _create_masked_store(
    builder: InterpreterBuilder,
    ptrs: TensorHandle,
    value: TensorHandle,
    mask: TensorHandle | np.ndarray,
    *args: object,
    **kwargs: object,
) -> object:
    # It writes elements of the array's size, whatever the pointer's.
    expected = _numpy(ptrs.get_element_ty())
    assert value.data.itemsize == expected.itemsize, f"{value.data.dtype} stored as {expected}"
    ptrs = _touched(ptrs, _flags(mask), "store")
    return _original_store(builder, ptrs, value, mask, *args, **kwargs)


def _create_atomic_rmw(
    builder: InterpreterBuilder,
    op: object,
    ptr: TensorHandle,
    val: TensorHandle,
    mask: TensorHandle,
    *args: object,
) -> TensorHandle:
    if _is_bfloat16(val):
        raise NotImplementedError("the interpreter has no atomics of bfloat16")
    ptr = _touched(ptr, mask.data, "atomic")
    return _original_atomic_rmw(builder, op, ptr, val, mask, *args)


def _create_atomic_cas(
    builder: InterpreterBuilder, ptr: TensorHandle, *args: object
) -> TensorHandle:
    ptr = _touched(ptr, np.ones(ptr.data.shape, bool), "atomic")
    return _original_atomic_cas(builder, ptr, *args)


def _numpy(dtype: tl.dtype) -> np.dtype:
    return interpreter._get_np_dtype(dtype)


def _is_bfloat16(handle: TensorHandle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _values(handle: TensorHandle) -> np.ndarray:
    """The numbers of a block, those of bfloat16 in float32."""
    if not _is_bfloat16(handle):
        return handle.data
    return (handle.data.astype(np.uint32) << 16).view(np.float32)


def _bfloat16(x: np.ndarray) -> np.ndarray:
    """The bits of ``x``, rounded to nearest, ties to even."""
    x = np.asarray(x, np.float32)
    bits = x.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))) >> 16
    return np.where(np.isnan(x), np.uint32(0x7FFF), rounded).astype(np.uint16)


def _handle(result: np.ndarray, dtype: tl.dtype) -> TensorHandle:
    """Of what was computed with values of bfloat16."""
    if result.dtype == np.bool_:
        return TensorHandle(result, tl.int1)
    if dtype.scalar == tl.bfloat16:
        return TensorHandle(_bfloat16(result), tl.bfloat16)
    return TensorHandle(result.astype(_numpy(dtype.scalar)), dtype.scalar)


def _cast(builder: InterpreterBuilder, src: TensorHandle, dst_type: tl.dtype) -> TensorHandle:
    if tl.bfloat16 not in (src.dtype.scalar, dst_type.scalar):
        return _original_cast(builder, src, dst_type)
    to = dst_type.scalar
    result = _bfloat16(_values(src)) if to == tl.bfloat16 else _values(src).astype(_numpy(to))
    return TensorHandle(result, to)


def _get_bf16(builder: InterpreterBuilder, value: float) -> TensorHandle:
    return TensorHandle(_bfloat16(np.array([value])), tl.bfloat16)


def _unary_op(
    builder: InterpreterBuilder, arg: TensorHandle, op: Callable[..., np.ndarray]
) -> TensorHandle:
    if not _is_bfloat16(arg):
        return _original_unary(builder, arg, op)
    return _handle(op(_values(arg)), arg.dtype)


def _binary_op(
    builder: InterpreterBuilder,
    lhs: TensorHandle,
    rhs: TensorHandle,
    op: Callable[..., np.ndarray],
) -> TensorHandle:
    if not (_is_bfloat16(lhs) or _is_bfloat16(rhs)):
        return _original_binary(builder, lhs, rhs, op)
    return _handle(op(_values(lhs), _values(rhs)), lhs.dtype)


def _create_fma(
    builder: InterpreterBuilder, x: TensorHandle, y: TensorHandle, z: TensorHandle
) -> TensorHandle:
    if not _is_bfloat16(z):
        return _original_fma(builder, x, y, z)
    return _handle(_values(x) * _values(y) + _values(z), z.dtype)


def _sum(reduction: ReduceOps, input: tl.tensor) -> tl.tensor:
    if not _is_bfloat16(input.handle):
        return _original_sum(reduction, input)
    total = _values(input.handle).sum(axis=reduction.axis, keepdims=reduction.keep_dims)
    return reduction.to_tensor(_bfloat16(total), input.dtype)


def _create_dot(
    builder: InterpreterBuilder,
    a: TensorHandle,
    b: TensorHandle,
    d: TensorHandle,
    input_precision: object,
    max_num_imprecise_acc: int,
) -> TensorHandle:
    if a.dtype.scalar in (tl.bfloat16, tl.float16):
        product = _values(a).astype(np.float32) @ _values(b).astype(np.float32)
    elif a.dtype.scalar == tl.float32:
        product = _float32_product(a.data, b.data, input_precision)
    else:
        return _original_dot(builder, a, b, d, input_precision, max_num_imprecise_acc)
    return TensorHandle(product.astype(d.data.dtype) + d.data, d.dtype.scalar)


def _float32_product(a: np.ndarray, b: np.ndarray, input_precision: object) -> np.ndarray:
    precisions = interpreter._ir.INPUT_PRECISION
    if input_precision == precisions.TF32:
        # Triton hands over float32 as it is, and the tensor cores read 10 bits of its mantissa.
        return _tf32(a, 0) @ _tf32(b, 0)
    if input_precision == precisions.TF32x3:
        # As Triton expands it: what rounding leaves is a second operand, whose product with the
        # other one's is left out; NaN of the corrections (of infinities) are not taken over.
        half = 1 << 12
        big_a, big_b = _tf32(a, half), _tf32(b, half)
        with np.errstate(invalid="ignore"):
            small_a, small_b = _tf32(a - big_a, 0), _tf32(b - big_b, 0)
            corrections = small_a @ big_b + big_a @ small_b
        return big_a @ big_b + np.where(np.isnan(corrections), 0, corrections)
    return a @ b


def _tf32(x: np.ndarray, add: int) -> np.ndarray:
    """The upper 19 bits of ``x``: towards zero, or, with half of the last one added, nearest."""
    bits = (x.view(np.uint32) + np.uint32(add)) & np.uint32(0xFFFFE000)
    return np.where(np.isfinite(x), bits.view(np.float32), x)


def _replacements() -> list[tuple[object, str, object]]:
    builder = interpreter_builder
    # Every architecture asks for the same.
    codegen = {**builder.codegen_fns, "min_dot_size": min_dot_size(GPUTarget("cuda", 80, 32))}
    return [
        (GridExecutor, "__call__", _call),
        (interpreter, "_implicit_cvt", _convert),
        (InterpreterBuilder, "create_masked_load", _create_masked_load),
        (InterpreterBuilder, "create_masked_store", _create_masked_store),
        (InterpreterBuilder, "create_atomic_rmw", _create_atomic_rmw),
        (InterpreterBuilder, "create_atomic_cas", _create_atomic_cas),
        (InterpreterBuilder, "create_dot", _create_dot),
        (InterpreterBuilder, "cast_impl", _cast),
        (InterpreterBuilder, "get_bf16", _get_bf16),
        (InterpreterBuilder, "unary_op", _unary_op),
        (InterpreterBuilder, "binary_op", _binary_op),
        (InterpreterBuilder, "create_fma", _create_fma),
        (ReduceOps, "sum", _sum),
        (builder, "codegen_fns", codegen),
        # The semantics compute the checks for overflow anyway, and look at them in debug only.
        (builder, "options", dataclasses.replace(builder.options, debug=True)),
    ]


def _replace(attributes: list[tuple[object, str, object]]) -> list[tuple[object, str, object]]:
    """Sets attributes; returns what sets them back, ``None`` for those that were not there."""
    before = [(owner, name, getattr(owner, name, None)) for owner, name, _ in attributes]
    for owner, name, value in attributes:
        if value is None:
            delattr(owner, name)
        else:
            setattr(owner, name, value)
    return before
