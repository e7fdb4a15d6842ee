"""The forward of a module written out as source, in which runs of its children are single calls.

torch.fx calls ``forward`` on stand-ins for tensors and writes down what is done with them. What
Python does besides is done in that call and lost to later ones. So a trace is refused, with the
reason, where later calls may differ: in the training mode, by random numbers, by attributes that
can change unseen, by the type of an input. What it took from the module it keeps, and
:meth:`Trace.change` says whether the module is still as it was. Globals are taken to be constant.
"""

from __future__ import annotations

import contextlib
import enum
import functools
import inspect
import operator
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.package import sys_importer

from fastgan.nn.blocks import ACTIVATION_MODULES, CONVOLUTIONS, Activation, laid_out_as, run_parts

CONTAINERS = (nn.ModuleList, nn.ModuleDict)
_CONTAINERS = (*CONTAINERS, nn.ParameterList, nn.ParameterDict)

# What cannot change but by being set anew.
_CONSTANTS = (
    *(bool, int, float, complex, str, bytes, type(None), type, enum.Enum, range),
    *(torch.dtype, torch.device, torch.memory_format, FunctionType, BuiltinFunctionType),
)
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))

# With the slope that it has where none is given.
_FUNCTIONS: dict[Any, Activation] = {
    **dict.fromkeys((F.relu, F.relu_, torch.relu, torch.relu_), Activation("relu")),
    **dict.fromkeys((F.tanh, torch.tanh, torch.tanh_), Activation("tanh")),
    **dict.fromkeys((F.leaky_relu, F.leaky_relu_), Activation("leaky_relu", 0.01)),
}
_METHODS = {
    **dict.fromkeys(("relu", "relu_"), Activation("relu")),
    **dict.fromkeys(("tanh", "tanh_"), Activation("tanh")),
}


class UntraceableError(Exception):
    """A forward that cannot be written out; the message says why."""


class Trace(NamedTuple):
    """The forward of one class of modules, and what it took from the module that was traced.

    Attributes:
        source: a module's text that defines ``forward(self, ...)``, with its imports.
        inputs: the names of the tensors that it takes, all that ``forward`` must be given.
        optional: whether ``forward`` takes more.
        chains: the runs, each of the paths of modules and of functions.
        reasons: by the path of a convolution, why it is in no run, or in one that ends with it.
        attributes: the plain attributes that were read, and their values.
        members: the names of children and parameters.
    """

    source: str
    inputs: tuple[str, ...]
    optional: bool
    chains: tuple[tuple[str | Activation, ...], ...]
    reasons: tuple[tuple[str, str], ...]
    attributes: tuple[tuple[str, Any], ...]
    members: tuple[str, ...]

    def change(self, module: nn.Module) -> str | None:
        """What about ``module`` is no longer as it was traced; None if nothing is."""
        for name, value in self.attributes:
            now = getattr(module, name, None)
            if type(now) is not type(value) or now != value:
                return f"self.{name} is no longer {value!r}"
        if _members(module) != self.members:
            return "it has other children or parameters"
        return None

    def takes(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether a call with these arguments is one that was traced."""
        given = (*args, *kwargs.values())
        return (
            len(given) == len(self.inputs)
            and set(kwargs) == set(self.inputs[len(args) :])
            and all(isinstance(x, Tensor) for x in given)
        )


def trace(module: nn.Module) -> Trace:
    """Write out ``module``'s forward.

    Raises:
        UntraceableError: it cannot be.
    """
    with _untouched(module):
        graphs, sources, read = [], [], {}
        for training in (True, False):
            for part in module.modules():
                part.training = training
            graph, attributes = _graph(module)
            graphs.append(graph)
            sources.append(_source(graph))
            read.update(attributes)
    if sources[0] != sources[1]:
        raise UntraceableError("its forward depends on self.training, or on chance")
    chains, reasons = _join_runs(graphs[0], module)
    parameters = len(inspect.signature(type(module).forward).parameters)
    inputs = tuple(node.target for node in graphs[0].nodes if node.op == "placeholder")
    return Trace(
        source=_source(graphs[0]),
        inputs=inputs,
        optional=parameters > 1 + len(inputs),
        chains=chains,
        reasons=reasons,
        attributes=tuple(read.items()),
        members=_members(module),
    )


class _Proxy(fx.Proxy):
    """A stand-in for a tensor that keeps in-place operators apart, and has no type to ask for."""

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        asks = sys._getframe(1).f_globals.get("__name__", "")
        if asks.partition(".")[0] != "torch":
            raise UntraceableError("its forward asks for the type of a value")
        return _Proxy


def _in_place(function: Callable[..., Any]) -> Callable[[fx.Proxy, Any], fx.Proxy]:
    def call(self: fx.Proxy, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return call


# torch.fx has `x += y` as `x = x + y`, which leaves other names of the same tensor as they were.
for _name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul"):
    setattr(_Proxy, f"__{_name}__", _in_place(getattr(operator, _name)))


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True

    def __init__(self) -> None:
        super().__init__()
        self._modes_before = _modes()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def create_args_for_root(
        self, root_fn: Any, is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        # What has a default has it: a call with another value is one that is not traced.
        _, *parameters = inspect.signature(root_fn).parameters.values()
        inputs = []
        for p in parameters:
            if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) or p.default is not p.empty:
                continue
            if p.kind is p.KEYWORD_ONLY:
                raise UntraceableError(f"its forward must be given {p.name} by name")
            inputs.append(self.create_proxy("placeholder", p.name, (), {}))
        return root_fn, [self.root, *inputs]

    def create_proxy(self, kind: str, *args: Any, **kwargs: Any) -> fx.Proxy:
        if _modes() != self._modes_before:
            raise UntraceableError(
                "its forward turns gradients, autocast or checkpointing on or off"
            )
        return super().create_proxy(kind, *args, **kwargs)

    def create_arg(self, a: Any) -> Any:
        if issubclass(type(a), Tensor) and not any(
            a is own for own in (*self.root.parameters(), *self.root.buffers())
        ):
            raise UntraceableError(
                "its forward uses a tensor that is no parameter, buffer or input"
            )
        return super().create_arg(a)


def _modes() -> tuple[Any, ...]:
    """What ``with`` can set around an operation, and torch.fx does not write down."""
    return (
        torch._C._autograd._top_saved_tensors_default_hooks(True),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        *(torch.is_autocast_enabled(device) for device in ("cpu", "cuda")),
    )


def _graph(module: nn.Module) -> tuple[fx.Graph, dict[str, Any]]:
    """The graph of ``module``'s forward, and the plain attributes that it read."""
    read: dict[str, Any] = {}
    changing: list[str] = []

    class Recorder(type(module)):  # type: ignore[misc]
        def __getattribute__(self, name: str) -> Any:
            value = super().__getattribute__(name)
            if name not in _OF_EVERY_MODULE and not name.startswith("__"):
                own = name in object.__getattribute__(self, "__dict__")
                if _is_constant(value) and (own or not isinstance(value, (FunctionType, type))):
                    read[name] = value
                elif own:
                    changing.append(f"its forward reads self.{name}, a {type(value).__name__}")
            return value

    module.__class__ = Recorder
    try:
        graph = _Tracer().trace(module)
    except UntraceableError:
        raise
    except Exception as error:
        first = (str(error).strip().splitlines() or [repr(error)])[0]
        raise UntraceableError(f"torch.fx cannot trace its forward: {first}") from error
    finally:
        module.__class__ = Recorder.__mro__[1]
    if changing:
        raise UntraceableError(f"{changing[0]}, which can change unseen")
    return graph, read


def _is_constant(value: Any) -> bool:
    if type(value) in (tuple, frozenset, torch.Size):
        return all(map(_is_constant, value))
    return issubclass(type(value), _CONSTANTS)  # isinstance would ask a stand-in for its type


@contextlib.contextmanager
def _untouched(module: nn.Module) -> Iterator[None]:
    """Undo what a forward does to ``module`` and to random generators, and refuse it.

    Raises:
        UntraceableError: on leaving, if it did any of that; ``training`` may be changed.
    """
    attributes = [(part, dict(vars(part))) for part in module.modules()]
    generators = _generators()
    try:
        yield
    finally:
        set_: list[str] = []
        for part, before in attributes:
            after = vars(part)
            set_ += [
                name
                for name in after.keys() | before.keys()
                if name != "training" and after.get(name, ...) is not before.get(name, ...)
            ]
            after.clear()
            after.update(before)
        drawn = not _same(_generators(), generators)
        torch.set_rng_state(generators[0])
        np.random.set_state(generators[1])
        random.setstate(generators[2])
        if set_:
            raise UntraceableError(f"its forward sets {', '.join(sorted(set_))}")
        if drawn:
            raise UntraceableError("its forward draws random numbers")


def _generators() -> tuple[Any, ...]:
    return torch.get_rng_state(), np.random.get_state(), random.getstate()


def _same(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    return torch.equal(a[0], b[0]) and all(map(np.array_equal, a[1], b[1])) and a[2] == b[2]


def _members(module: nn.Module, prefix: str = "") -> tuple[str, ...]:
    """Names of children and parameters that there are, those of lists of modules too."""
    names = []
    for table in (module._modules, module._parameters, module._buffers):
        for name, member in table.items():
            if member is not None:
                names.append(prefix + name)
            if isinstance(member, _CONTAINERS):
                names += _members(member, f"{prefix}{name}.")
    return tuple(names)


def _join_runs(
    graph: fx.Graph, module: nn.Module
) -> tuple[tuple[tuple[str | Activation, ...], ...], tuple[tuple[str, str], ...]]:
    """Make each run of ``graph`` one call of :func:`run_parts`."""
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    chains: list[tuple[str | Activation, ...]] = []
    reasons: dict[str, str] = {}
    runs: list[fx.Node] = []

    def is_call(node: Any, kinds: tuple[type[nn.Module], ...]) -> bool:
        return (
            node is not None
            and node.op == "call_module"
            and isinstance(module.get_submodule(node.target), kinds)
        )

    def obstacle(node: Any) -> str | None:
        if calls[node.target] > 1:
            return f"{node.target} is called {calls[node.target]} times in one forward"
        if len(node.args) != 1 or node.kwargs:
            return f"{node.target} is called with more than its input"
        return None

    for first in list(graph.nodes):
        if not is_call(first, CONVOLUTIONS):
            continue
        if reason := obstacle(first):
            reasons[first.target] = reason
            continue
        run, chain = [first], [first.target]
        after: Any = _only_user(first)
        if is_call(after, (nn.BatchNorm2d,)):
            if reason := obstacle(after):
                reasons[first.target] = reason
                after = None
            else:
                run.append(after)
                chain.append(after.target)
                after = _only_user(after)
        if is_call(after, tuple(ACTIVATION_MODULES)) or (after and _function(after)):
            run.append(after)
            chain.append(after.target if after.op == "call_module" else _function(after))
        elif len(run[-1].users) > 1:
            reasons[first.target] = f"the output of {chain[-1]} is used more than once"
        # At the first of them: what changes its input in place after that must not be seen.
        with graph.inserting_before(first):
            parts = [graph.get_attr(part) if isinstance(part, str) else part for part in chain]
            call = graph.call_function(run_parts, (first.args[0], *parts))
        run[-1].replace_all_uses_with(call)
        for part in reversed(run):
            graph.erase_node(part)
        chains.append(tuple(chain))
        runs.append(call)
    _keep_layouts(graph, runs)
    return tuple(chains), tuple(reasons.items())


def _keep_layouts(graph: fx.Graph, runs: list[fx.Node]) -> None:
    """Runs hand one another what they make; to others it is laid out as PyTorch would have it."""
    like: dict[fx.Node, fx.Node] = {}
    for run in runs:
        x: Any = run.args[0]
        like[run] = like.get(x, x)
        if all(user in runs and user.args[0] is run for user in run.users):
            continue
        with graph.inserting_after(run):
            laid_out = graph.call_function(laid_out_as, (run, like[run], run.args[1]))
        others = functools.partial(operator.is_not, laid_out)
        run.replace_all_uses_with(laid_out, delete_user_cb=others)


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _function(node: fx.Node) -> Activation | None:
    """The activation that ``node`` calls as a function; None if it calls something else."""
    table = {"call_function": _FUNCTIONS, "call_method": _METHODS}.get(node.op)
    if table is None or node.target not in table or len(node.all_input_nodes) != 1:
        return None
    name, slope = table[node.target]
    if name != "leaky_relu":
        return Activation(name)
    given: Any = [*node.args[1:2], node.kwargs.get("negative_slope", slope)][0]
    return Activation(name, given) if isinstance(given, (int, float)) else None


def _source(graph: fx.Graph) -> str:
    # Annotations may name what cannot be imported.
    for node in graph.nodes:
        node.type = None
    code = graph.python_code("self")
    used = _names(compile(code.src, "<fx>", "exec"))
    imports = [_import(name, value) for name, value in code.globals.items() if name in used]
    return "\n".join([*sorted(imports), code.src.strip(), ""])


def _names(code: Any) -> set[str]:
    inner = (c for c in code.co_consts if hasattr(c, "co_names"))
    return set(code.co_names).union(*map(_names, inner))


def _import(name: str, value: Any) -> str:
    if isinstance(value, ModuleType):
        return f"import {value.__name__} as {name}"
    if isinstance(value, float):
        return f"{name} = float({name!r})"
    try:
        home, path = sys_importer.get_name(value)
    except Exception as error:
        raise UntraceableError(f"its forward calls {value!r}, which cannot be imported") from error
    first, *rest = path.split(".")
    return "\n".join(
        [f"from {home} import {first} as {name}", *(f"{name} = {name}.{part}" for part in rest)]
    )
