"""What a CUDA graph cannot hold, or would freeze, raises: capture safety without a GPU.

Under the guard a step may not wait for its results on the host, choose shapes by them, take data
from the host, draw from a generator that the graph does not know, or move what it keeps. Two runs
have to make the same calls with the same numbers in them: a counter in Python, or a random number
from elsewhere, would be the recorded one in every replay. The bodies of fastgan's own ops are
watched as well as the operators that the step calls. Measuring which way is fastest is not: a step
is run before it is captured, and what has been measured is known by then.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any
from unittest import mock

import torch
from support.tape_graph import address_of, tensors_of
from torch import Tensor, nn
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from fastgan.ops import tuning


class CaptureError(RuntimeError):
    """A step does what a graph cannot hold."""


_WAITS = "waits for the device"
_SHAPE = "has a shape that depends on values, which the host has to read"
_HOST = "takes data from the host"
_INDEXED = {
    *("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"),
    *("aten::_unsafe_index", "aten::_unsafe_index_put"),
}
_REFUSED = {
    **dict.fromkeys(
        ("aten::_local_scalar_dense", "aten::item", "aten::is_nonzero", "aten::equal"), _WAITS
    ),
    **dict.fromkeys(("aten::allclose", "aten::record_stream", "aten::_pin_memory"), _WAITS),
    # On a GPU: whether a factorisation failed, and the range of a histogram.
    **dict.fromkeys(("aten::_linalg_check_errors", "aten::histc"), _WAITS),
    **dict.fromkeys(
        (
            *("aten::nonzero", "aten::nonzero_numpy", "aten::masked_select", "aten::argwhere"),
            *("aten::unique_dim", "aten::_unique", "aten::_unique2", "aten::bincount"),
            *("aten::unique_consecutive", "aten::unique_dim_consecutive"),
        ),
        _SHAPE,
    ),
    "aten::lift_fresh": _HOST,
}
_FROZEN = (
    *(int, float, complex, bool, str),
    *(torch.dtype, torch.device, torch.memory_format, torch.layout),
)
# What need not reach an operator: on the CPU a tensor is read, and made, where the data lie. A
# function mode would not do: it is off within ``backward``.
_READS = ("tolist", "numpy", "__array__", "__dlpack__", "item", "cpu", "__bool__", "__index__")
_MAKES = ("from_numpy", "frombuffer", "from_dlpack")
_UNSEEN: list[tuple[Any, str, str, str]] = [
    *((torch.Tensor, name, f"Tensor.{name}", _WAITS) for name in _READS),
    *((torch, name, f"torch.{name}", _HOST) for name in _MAKES),
    (torch.cuda, "synchronize", "torch.cuda.synchronize", _WAITS),
    (torch.cuda.Stream, "synchronize", "Stream.synchronize", _WAITS),
    (torch.cuda.Event, "synchronize", "Event.synchronize", _WAITS),
    (torch.accelerator, "synchronize", "torch.accelerator.synchronize", _WAITS),
]


class CaptureGuard(contextlib.AbstractContextManager["CaptureGuard"]):
    """Watches a step; see :meth:`run`.

    Entered before a tape records, not within: the tape is then handed fastgan's ops whole, and not
    their bodies, whose kernels write unseen.

    Args:
        generators: those that the graph would be told of. The default one is not among them unless
            it is given: fastgan draws from generators of its own.
        host: tensors that stand for memory of the host.
    """

    def __init__(
        self, generators: Iterable[torch.Generator] = (), host: Iterable[Tensor] = ()
    ) -> None:
        self._generators = tuple(generators)
        self._host = {address_of(tensor) for tensor in host}
        self._entered: list[contextlib.ExitStack] = []
        self._before: tuple[dict[str, int], list[Any]] | None = None
        self.tape: list[Any] = []
        self.made: set[int] = set()

    def __enter__(self) -> CaptureGuard:
        stack = contextlib.ExitStack()
        for owner, name, label, reason in _UNSEEN:
            stack.enter_context(_refused(owner, name, label, reason))
        stack.enter_context(mock.patch.object(tuning, "_measure", _unwatched(tuning._measure)))
        stack.enter_context(_Operators(self))
        self._entered.append(stack)
        return self

    def __exit__(self, *error: Any) -> None:
        self._entered.pop().close()

    def run(self, fn: Callable[[], object], state: Sequence[Any]) -> None:
        """Run ``fn`` once, and compare with the run before.

        Args:
            state: the modules, optimisers, gradient scalers and tensors that it keeps.

        Raises:
            CaptureError: it does what a graph cannot hold, made other calls than before, or moved
                what it keeps.
        """
        self.tape, self.made = [], set()
        before = _kept(state)
        with self:
            fn()
        after = _kept(state)
        moved = [name for name in before if after.get(name) != before[name]]
        if self._before is not None:
            moved += [name for name, place in self._before[0].items() if after.get(name) != place]
        # A gradient may be gone, or in memory of this run, as in the graph's own pool.
        fine = {None, *self.made}
        moved = [n for n in moved if not (n.endswith(".grad") and after.get(n) in fine)]
        if moved:
            raise CaptureError(f"lies elsewhere than before: {', '.join(sorted({*moved})[:3])}")
        if self._before is not None:
            _compare(self._before[1], self.tape)
        self._before = after, self.tape

    def check(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Raises where a graph cannot hold this call of an operator."""
        name = func._schema.name
        if reason := _REFUSED.get(name):
            raise CaptureError(f"{name} {reason}")
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if self._host & {address_of(tensor) for tensor in tensors}:
            raise CaptureError(f"{name} {_HOST}")
        devices = {tensor.device for tensor in tensors if tensor.ndim}
        asked = kwargs.get("device")
        if asked is not None and tensors:
            devices.add(torch.empty(0, device=asked).device)
        if len(devices) > 1:
            raise CaptureError(f"{name} copies between {', '.join(sorted(map(str, devices)))}")
        masked = name in _INDEXED
        if masked and any(t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1]):
            raise CaptureError(f"{name} by a mask {_SHAPE}")
        if name == "aten::repeat_interleave" and kwargs.get("output_size") is None:
            raise CaptureError(f"{name} {_SHAPE}")
        if torch.Tag.nondeterministic_seeded in func.tags and _draws(func, args, kwargs):
            given = [g for g in (*args, *kwargs.values()) if isinstance(g, torch.Generator)]
            # Each call wraps the generator anew.
            known = {generator._cdata for generator in self._generators}
            drawn = {generator._cdata for generator in given or [torch.default_generator]}
            if not drawn <= known:
                raise CaptureError(f"{name} draws from a generator that the graph does not know")

    def note(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Puts the call on the tape, with all that a recording of it would freeze."""
        frozen = []
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor):
                frozen.append((tuple(leaf.shape), leaf.dtype))
            elif isinstance(leaf, torch.Generator):
                frozen.append(leaf._cdata)
            elif isinstance(leaf, _FROZEN):
                # A NaN is no other than the one before.
                frozen.append(leaf if leaf == leaf else "nan")
        self.tape.append((func._schema.name, tuple(frozen)))


def _refused(owner: Any, name: str, label: str, reason: str) -> Any:
    """A patch of ``owner.name`` that raises in this thread; a loader's may go on."""
    allowed, watched = getattr(owner, name), threading.get_ident()

    def refuse(*args: Any, **kwargs: Any) -> Any:
        # Memory of the C++ kernels comes as blocks, which take the place of an allocator's.
        block = name == "frombuffer" and type(next(iter(args), None)).__module__ == "fastgan._cpu"
        if block or threading.get_ident() != watched:
            return allowed(*args, **kwargs)
        raise CaptureError(f"{label} {reason}")

    return mock.patch.object(owner, name, refuse)


def _unwatched(measure: Callable[..., Any]) -> Callable[..., Any]:
    def measured(*args: Any) -> Any:
        with _disable_current_modes():
            return measure(*args)

    return measured


class _Operators(TorchDispatchMode):
    def __init__(self, guard: CaptureGuard) -> None:
        super().__init__()
        self._guard = guard

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        guard = self._guard
        guard.check(func, args, kwargs)
        guard.note(func, args, kwargs)
        body = _body(func, args, kwargs)
        if body is None:
            result = func(*args, **kwargs)
        else:
            with _Operators(guard), torch.no_grad():
                result = body(*args, **kwargs)
        given = {address_of(t) for t in tensors_of((args, kwargs))}
        made = (address_of(t) for t in tensors_of(result))
        guard.made |= {address for address in made if address not in given}
        return result


def _body(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[..., Any] | None:
    """The Python of one of fastgan's ops, which its operator would run out of the guard's sight."""
    if func.namespace != "fastgan":
        return None
    device = tensors_of((args, kwargs))[0].device.type
    bodies = OPDEFS[func._schema.name]._backend_fns
    return bodies.get(device) or bodies[None]


def _draws(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Not a dropout that is switched off."""
    named = {a.name: v for a, v in zip(func._schema.arguments, args, strict=False)} | kwargs
    return named.get("train", True) is not False and named.get("p") != 0.0


def _kept(state: Sequence[Any]) -> dict[str, int]:
    """By name, where everything lies that a step keeps."""
    found: dict[str, Tensor] = {}
    for i, part in enumerate(state):
        if isinstance(part, nn.Module):
            for name, tensor in (*part.named_parameters(), *part.named_buffers()):
                found[f"{i}.{name}"] = tensor
                if tensor.grad is not None:
                    found[f"{i}.{name}.grad"] = tensor.grad
        elif isinstance(part, torch.optim.Optimizer):
            for j, moments in enumerate(part.state.values()):
                for name, value in moments.items():
                    found[f"{i}.state{j}.{name}"] = value
            for j, group in enumerate(part.param_groups):
                found[f"{i}.group{j}.lr"] = group["lr"]
        elif isinstance(part, torch.amp.GradScaler):
            found |= {f"{i}.scale": part._scale, f"{i}.growth": part._growth_tracker}
        else:
            found[f"{i}"] = part
    return {name: value.data_ptr() for name, value in found.items() if isinstance(value, Tensor)}


def _compare(before: list[Any], after: list[Any]) -> None:
    for i, (was, now) in enumerate(zip(before, after, strict=False)):
        if was != now:
            raise CaptureError(f"call {i} was {was[0]} of {was[1]}, and is {now[0]} of {now[1]}")
    if len(before) != len(after):
        raise CaptureError(f"a run made {len(before)} calls, and the next {len(after)}")
