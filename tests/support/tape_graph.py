"""A stand-in for ``torch.cuda.CUDAGraph`` on the CPU: a tape of operators and the tensors they met.

Recording leaves no trace, as capturing a CUDA graph does not run anything: what an operator changed
is put back, and what it made is filled with NaN until the first replay. A replay runs the operators
again on the same memory. Python is not run again: a counter in it stays as it was recorded.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Operators that change arguments of these names, and do not say so in their schema.
_UNDECLARED = {
    "aten::native_batch_norm": ("running_mean", "running_var"),
    "aten::cudnn_batch_norm": ("running_mean", "running_var"),
}


class _Call(NamedTuple):
    operator: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    made: list[Tensor | None]  # of each tensor that it returns, or None where that is a view


class TapeGraph:
    """What :class:`fastgan.engine.capture.CudaGraph` is on a GPU.

    Attributes:
        calls: the tape.
    """

    def __init__(self, device: torch.device | None = None, pool: object = None) -> None:
        self.calls: list[_Call] = []
        self.pool = pool

    @contextlib.contextmanager
    def warm_up(self, strict: bool = False) -> Iterator[None]:
        yield

    @contextlib.contextmanager
    def record(self, generators: Sequence[torch.Generator] = ()) -> Iterator[None]:
        states = [(g, g.get_state()) for g in (*generators, torch.default_generator)]
        recorder = _Recorder()
        try:
            with recorder:
                yield
        finally:
            recorder.undo()
            for generator, state in states:
                generator.set_state(state)
        self.calls = recorder.calls

    @torch.no_grad()
    # What was recorded has been cast, or was not to be.
    @torch.autocast("cpu", enabled=False)
    def replay(self) -> None:
        for operator, args, kwargs, made in self.calls:
            results = tensors_of(operator(*args, **kwargs))
            for before, now in zip(made, results, strict=True):
                if before is not None:
                    _whole(before).copy_(_whole(now))


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[_Call] = []
        self._made: dict[int, Tensor] = {}
        self._changed: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        for tensor in changed_by(func, args, kwargs):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self._made:
                self._changed.setdefault(storage.data_ptr(), (storage, storage.clone()))
        given = {address_of(tensor) for tensor in tensors_of((args, kwargs))}
        result = func(*args, **kwargs)
        results = tensors_of(result)
        made = [None if address_of(tensor) in given else tensor for tensor in results]
        for tensor in made:
            if tensor is not None:
                self._made.setdefault(address_of(tensor), tensor)
        self.calls.append(_Call(func, args, kwargs, made))
        return result

    def undo(self) -> None:
        for storage, before in self._changed.values():
            storage.copy_(before)
        for tensor in self._made.values():
            if tensor.is_floating_point():
                _whole(tensor).fill_(torch.nan)


def changed_by(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors that a call of the operator ``func`` changes in place."""
    undeclared = _UNDECLARED.get(func._schema.name, ())
    found = []
    for i, argument in enumerate(func._schema.arguments):
        value = args[i] if i < len(args) else kwargs.get(argument.name)
        written = argument.alias_info is not None and argument.alias_info.is_write
        if written or argument.name in undeclared:
            found += tensors_of(value)
    return found


def tensors_of(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def address_of(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _whole(tensor: Tensor) -> Tensor:
    """All that lies in the memory of ``tensor``."""
    storage = tensor.untyped_storage()
    size = storage.nbytes() // tensor.element_size()
    return torch.empty(0, dtype=tensor.dtype).set_(storage, 0, (size,), (1,))
