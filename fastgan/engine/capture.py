"""Capturing a step in a CUDA graph, so that the whole of it is one launch.

A step is a function of tensors that changes a known state: networks, optimisers, tensors. Its
arguments are copied to where the graph reads them, and what it returns lies where the graph writes
it. Before a step is captured it is run a few times, so that whatever is made or measured at first
use is there; the state is then put back, so that capturing changes no number.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from fastgan import choices
from fastgan.errors import InputError
from fastgan.ops.backend import requested_backend

logger = logging.getLogger("fastgan")

Result = TypeVar("Result")
Part = nn.Module | torch.optim.Optimizer | torch.amp.GradScaler | Tensor

_WARM_UPS = 2
# Of argument shapes and settings, kept at a time.
_MOST_GRAPHS = 8


class Graph(Protocol):
    """What records a step and plays it again.

    Args:
        device: where the step runs.
        pool: the memory that it shares with graphs made before, theirs; None for the first.
    """

    pool: Any

    def __init__(self, device: torch.device, pool: Any) -> None: ...

    def warm_up(self, strict: bool) -> contextlib.AbstractContextManager[None]:
        """Within, a step runs as before it is recorded; ``strict`` raises where it synchronises."""

    def record(
        self, generators: Sequence[torch.Generator]
    ) -> contextlib.AbstractContextManager[None]:
        """Within, what is launched is recorded, and not run."""

    def replay(self) -> None:
        """Run what was recorded, on the same memory."""


class CudaGraph:
    """A ``torch.cuda.CUDAGraph`` and the stream that it is recorded on.

    Graphs of one ``pool`` share memory: what one has written holds until another is played.
    """

    def __init__(self, device: torch.device, pool: Any) -> None:
        self._graph = torch.cuda.CUDAGraph()
        self.pool = pool or torch.cuda.graph_pool_handle()
        self._stream = _side_stream(device)
        self._device = device

    @contextlib.contextmanager
    def warm_up(self, strict: bool) -> Iterator[None]:
        """On the stream of the capture."""
        debug = torch.cuda.get_sync_debug_mode()
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream), warnings.catch_warnings():
                # Of the mode itself, which torch calls a prototype.
                warnings.simplefilter("ignore")
                if strict:
                    torch.cuda.set_sync_debug_mode("error")
                yield
        finally:
            torch.cuda.set_sync_debug_mode(debug)
            current.wait_stream(self._stream)

    @contextlib.contextmanager
    def record(self, generators: Sequence[torch.Generator]) -> Iterator[None]:
        """A failed capture leaves the generators as they were."""
        for generator in generators:
            self._graph.register_generator_state(generator)
        capture = torch.cuda.graph(
            self._graph,
            pool=self.pool,
            stream=self._stream,
            # Other threads, those of a loader for one, may allocate meanwhile.
            capture_error_mode="thread_local",
        )
        try:
            with torch.cuda.device(self._device), capture:
                yield
        except BaseException:
            for generator in (*generators, _default_generator(self._device)):
                _leave_capture(generator)
            raise

    def replay(self) -> None:
        """Launches on the current stream."""
        self._graph.replay()


_streams: dict[torch.device, torch.cuda.Stream] = {}


def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """The same at each call: autograd runs a node on the stream that made it."""
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device)
    return _streams[device]


def _default_generator(device: torch.device) -> torch.Generator:
    return torch.cuda.default_generators[device.index or 0]


def _leave_capture(generator: torch.Generator) -> None:
    """A generator that a failed capture has left expecting more of it draws again."""
    fresh = torch.Generator(generator.device)
    fresh.set_state(generator.get_state())
    generator.graphsafe_set_state(fresh.graphsafe_get_state())


# By type of device.
GRAPHS: dict[str, type[Graph]] = {"cuda": CudaGraph}


def uncapturable_reason(device: torch.device) -> str:
    """Why no step on ``device`` is captured; empty where it can be."""
    if device.type in GRAPHS:
        return ""
    return f"CUDA graphs are of GPUs, and the step is on {device.type}"


@dataclasses.dataclass
class _Recorded(Generic[Result]):
    """One graph, and what it reads and writes."""

    graph: Graph
    inputs: list[Any]
    result: Result
    gradients: list[tuple[Tensor, Tensor | None]]


class CapturedStep(Generic[Result]):
    """A step that is captured once for each kind of arguments, and replayed; see `capture_step`.

    Attributes:
        reason: why steps run as they are written, uncaptured; empty where they are captured.
        captures: how many graphs have been recorded so far.
    """

    def __init__(
        self,
        fn: Callable[..., Result],
        state: Iterable[Part],
        *,
        generators: Iterable[torch.Generator] = (),
        capture: choices.Capture = "auto",
    ) -> None:
        self._fn = fn
        self._state = _State(state)
        self._generators = tuple(generators)
        if capture not in ("auto", True, False):
            raise InputError(f"capture={capture!r} is unknown; choose 'auto', True or False")
        self._insist = capture is True
        self.captures = 0
        self._device = self._state.device
        self.reason = uncapturable_reason(self._device)
        if self.reason and self._insist:
            raise InputError(f"capture=True: {self.reason}; use 'auto'")
        if capture is False:
            self.reason = "capture=False"
        self._pool: Any = None
        self._recorded: OrderedDict[Hashable, _Recorded[Result]] = OrderedDict()
        self._places: list[int] = []
        self._begun: set[Hashable] = set()

    def __call__(self, *args: Any) -> Result:
        """Take one step.

        Args:
            args: tensors, which may lie anywhere, and hashable values, each set of which has a
                graph of its own.

        Returns:
            What the step returns. Captured, its tensors are overwritten by the next step.

        Raises:
            InputError: ``capture=True``, and the step cannot be captured; the message says why.
        """
        if self.reason:
            return self._take_as_written(args)
        # A graph reads and writes where things lay when it was recorded.
        places, settings = self._state.places_and_settings()
        if places != self._places:
            self.reset()
            self._places, settings = self._state.places_and_settings(anew=True)
        key = (_signature(args), settings, _environment(self._device))
        if key not in self._recorded and not self._record(key, args):
            return self._take_as_written(args)
        self._recorded.move_to_end(key)
        return self._replay(self._recorded[key], args)

    def reset(self) -> None:
        """Forget what was recorded: the next step is captured anew."""
        if self._recorded:
            self._wait()
        self._recorded.clear()
        # It ends with the last of its graphs.
        self._pool = None

    def _take_as_written(self, args: Sequence[Any]) -> Result:
        given = [
            x.to(self._device, non_blocking=True) if isinstance(x, Tensor) else x for x in args
        ]
        if self.reason:
            return self._fn(*given)
        # As a capture that follows: autograd remembers the stream.
        with self._new_graph().warm_up(strict=False), _in_this_thread():
            return self._fn(*given)

    def _record(self, key: Hashable, args: Sequence[Any]) -> bool:
        """Capture what replays the step; False where this one is to be taken as it is written."""
        inputs = [
            torch.empty_like(x.detach(), device=self._device).copy_(x.detach())
            if isinstance(x, Tensor)
            else x
            for x in args
        ]
        before = self._state.snapshot(self._generators)
        graph = self._new_graph()
        try:
            with _in_this_thread():
                for i in range(_WARM_UPS):
                    # What is made or measured at first use may wait for the device, no more later.
                    with graph.warm_up(strict=i == _WARM_UPS - 1):
                        self._fn(*inputs)
                    if self._state.has_grown(before):
                        self._state.restore(before)
                        return self._begin(key)
                self._state.restore(before)
                places, _ = self._state.places_and_settings(anew=True)
                if places != self._places:
                    # What was recorded before lacks what the warm-up has made.
                    self.reset()
                    self._places, graph = places, self._new_graph()
                with graph.record(self._generators):
                    result = self._fn(*inputs)
        except Exception as error:
            self._state.restore(before)
            first = (str(error).splitlines() or [type(error).__name__])[0]
            return self._give_up(f"{type(error).__name__}: {first}", error)
        if self._state.places_and_settings()[0] != places:
            self._state.restore(before)
            return self._give_up(
                "it moves a parameter, a buffer or an optimiser's state to new memory"
            )
        self.captures += 1
        gradients = [(p, p.grad) for p in self._state.parameters]
        self._keep(key, _Recorded(graph, inputs, result, gradients))
        return True

    def _begin(self, key: Hashable) -> bool:
        """An optimiser makes its state in its first step, which only that step can do right."""
        if key in self._begun:
            return self._give_up("an optimiser makes new state in each step")
        self._begun.add(key)
        return False

    def _give_up(self, reason: str, error: Exception | None = None) -> bool:
        self.reason = f"the step cannot be captured: {reason}"
        self.reset()
        if self._insist:
            raise InputError(
                f"capture=True: {self.reason}; keep to work on the device, or use capture='auto'"
            ) from error
        logger.warning("steps run one operation at a time: %s", self.reason)
        return False

    def _keep(self, key: Hashable, recorded: _Recorded[Result]) -> None:
        self._recorded[key] = recorded
        if len(self._recorded) > _MOST_GRAPHS:
            self._wait()
            self._recorded.popitem(last=False)
            logger.warning(
                "a step has been captured for more than %d sets of shapes and settings, and is "
                "captured anew when an old one comes back: keep learning rates in tensors, and "
                "batches of few sizes",
                _MOST_GRAPHS,
            )

    def _replay(self, recorded: _Recorded[Result], args: Sequence[Any]) -> Result:
        for mine, given in zip(recorded.inputs, args, strict=True):
            if isinstance(mine, Tensor) and mine is not given:
                mine.copy_(given.detach(), non_blocking=True)
        recorded.graph.replay()
        # Each graph has gradients of its own, which a caller may look at.
        for p, gradient in recorded.gradients:
            if p.grad is not gradient:
                p.grad = gradient
        return recorded.result

    def _wait(self) -> None:
        """A graph that is destroyed must not be running."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _new_graph(self) -> Graph:
        graph = GRAPHS[self._device.type](self._device, self._pool)
        self._pool = graph.pool
        return graph


def capture_step(
    fn: Callable[..., Result],
    state: Iterable[Part],
    *,
    generators: Iterable[torch.Generator] = (),
    capture: choices.Capture = "auto",
) -> CapturedStep[Result]:
    """A training step of your own, captured in a CUDA graph where there is a GPU.

    Calling the result is calling ``fn``. On a GPU the first call with each set of shapes records a
    graph, after warm-up runs whose every effect on ``state`` is undone, and each call replays it; a
    step in which an optimiser makes its state is taken as it is written. Elsewhere all are. A
    change of shapes, of a module's mode or gradients' requirement, of an optimiser's settings or of
    the backend records anew.

    Args:
        fn: the step: forward, backward, updates. It takes tensors and hashable values, each as an
            argument of its own, works on the device alone (no ``.item()``, no tensor made of a
            Python list) and does the same in each call: its Python runs while it is recorded, no
            more after.
        state: all that it changes: modules (with their gradients), optimisers, gradient scalers,
            tensors. Optimisers must be made with ``capturable=True`` and a tensor as learning rate
            if that is to change.
        generators: the random generators that it draws from, besides the default one.
        capture: ``auto`` runs what cannot be captured as it is written, and says why, once; True
            raises; False never captures.

    Raises:
        InputError: ``state`` has no tensor, is on several devices or holds something else;
            ``capture=True`` where there is nothing to capture on.

    Example::

        def train_step(real, z):
            opt.zero_grad()
            loss = criterion(netD(real), netD(netG(z)))
            loss.backward()
            opt.step()
            return loss.detach()

        step = fastgan.capture_step(train_step, [netG, netD, opt])
        for real in loader:
            loss = step(real, torch.randn(len(real), 100, 1, 1, device="cuda"))
    """
    return CapturedStep(fn, state, generators=generators, capture=capture)


@dataclasses.dataclass
class _Snapshot:
    """What there is, each with a copy of what it held."""

    tensors: list[tuple[Tensor, Tensor]]
    gradients: list[tuple[Tensor, Tensor | None, Tensor | None]]
    generators: list[tuple[torch.Generator, Tensor]]
    moments: list[tuple[torch.optim.Optimizer, dict[Any, dict[str, Any]]]]


class _State:
    """All that a step changes."""

    def __init__(self, parts: Iterable[Part]) -> None:
        self.parts = tuple(parts)
        for part in self.parts:
            if not isinstance(part, Part):
                raise InputError(
                    f"state: a {type(part).__name__} cannot be put back; give modules, optimisers, "
                    "gradient scalers and tensors"
                )
        self._modules = [p for p in self.parts if isinstance(p, nn.Module)]
        self._optimizers = [p for p in self.parts if isinstance(p, torch.optim.Optimizer)]
        self._parts_of_modules: list[nn.Module] = []
        found = {t.device for t in self.tensors() if t.ndim}
        if len(found) != 1:
            where = ", ".join(sorted(map(str, found))) or "no device: it holds no tensor"
            raise InputError(f"state is on {where}; it must be on one")
        (self.device,) = found

    @property
    def parameters(self) -> list[Tensor]:
        """Whatever may have a gradient."""
        found = [p for module in self._modules for p in module.parameters()]
        groups = [group for opt in self._optimizers for group in opt.param_groups]
        return list(dict.fromkeys([*found, *(p for group in groups for p in group["params"])]))

    def tensors(self) -> list[Tensor]:
        """Each once."""
        return list(dict.fromkeys(self._walk(anew=True)[0]))

    def places_and_settings(self, anew: bool = False) -> tuple[list[int], Hashable]:
        """Where all of it lies, and what a recorded step has read of it besides tensors.

        ``anew`` looks for the modules again, which is called for where the places have changed.
        """
        tensors, settings = self._walk(anew)
        return [tensor.data_ptr() for tensor in tensors], tuple(settings)

    def _walk(self, anew: bool) -> tuple[list[Tensor], list[Any]]:
        """Every tensor, some of them twice, and the rest; each step asks, so it has to be quick."""
        if anew:
            self._parts_of_modules = [part for module in self._modules for part in module.modules()]
        tensors: list[Tensor] = []
        settings: list[Any] = []
        for module in self._parts_of_modules:
            parameters = [p for p in module._parameters.values() if p is not None]
            tensors += parameters
            tensors += [buffer for buffer in module._buffers.values() if buffer is not None]
            settings.append(module.training)
            settings += [p.requires_grad for p in parameters]
            settings += map(id, module._modules.values())
        for optimizer in self._optimizers:
            for moments in optimizer.state.values():
                tensors += [value for value in moments.values() if isinstance(value, Tensor)]
            for group in optimizer.param_groups:
                for value in group.values():
                    if isinstance(value, Tensor):
                        tensors.append(value)
                    elif isinstance(value, list):
                        tensors += value
                    else:
                        settings.append(value)
        for part in self.parts:
            if isinstance(part, Tensor):
                tensors.append(part)
            elif isinstance(part, torch.amp.GradScaler) and part._scale is not None:
                tensors += [part._scale, part._growth_tracker]  # type: ignore[list-item]
        return tensors, settings

    def has_grown(self, before: _Snapshot) -> bool:
        """Whether there are tensors now that were not there before."""
        return not {*map(id, self.tensors())} <= {id(tensor) for tensor, _ in before.tensors}

    @torch.no_grad()
    def snapshot(self, generators: Sequence[torch.Generator]) -> _Snapshot:
        drawn = [*generators, torch.default_generator]
        if self.device.type == "cuda":
            drawn.append(_default_generator(self.device))
        gradients = [(p, p.grad) for p in self.parameters]
        return _Snapshot(
            [(tensor, tensor.clone()) for tensor in self.tensors()],
            [(p, grad, grad if grad is None else grad.clone()) for p, grad in gradients],
            [(generator, generator.get_state()) for generator in drawn],
            [
                (optimizer, {p: dict(moments) for p, moments in optimizer.state.items()})
                for optimizer in self._optimizers
            ],
        )

    @torch.no_grad()
    def restore(self, before: _Snapshot) -> None:
        """Values, where they lie now; gradients, where they lay."""
        for tensor, value in before.tensors:
            tensor.copy_(value)
        for p, gradient, held in before.gradients:
            p.grad = gradient
            if gradient is not None and held is not None:
                gradient.copy_(held)
        for generator, state in before.generators:
            generator.set_state(state)
        for optimizer, moments in before.moments:
            optimizer.state.clear()
            optimizer.state.update({p: dict(held) for p, held in moments.items()})


def _signature(args: Sequence[Any]) -> Hashable:
    return tuple((x.shape, x.dtype) if isinstance(x, Tensor) else x for x in args)


def _environment(device: torch.device) -> Hashable:
    """What a recorded step has read of the settings around it."""
    autocast = torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type)
    products = (
        torch.backends.cudnn.conv.fp32_precision,  # type: ignore[attr-defined]
        torch.backends.cuda.matmul.fp32_precision,
    )
    return requested_backend(), autocast, products, torch.is_grad_enabled()


def _in_this_thread() -> contextlib.AbstractContextManager[Any]:
    """Backward passes too: a stream is captured in the thread that captures it."""
    return torch.autograd.set_multithreading_enabled(False)
