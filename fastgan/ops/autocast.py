"""Autocast for the ops: in which dtype each computes, decided before any kernel is chosen.

torch casts what goes into its own operators, not what goes into ours; and within ours its casts
would change the dtypes that a kernel was chosen for. So the public functions cast their arguments
by a policy, as torch's lists do for its own, and run with autocast off.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

Function = TypeVar("Function", bound=Callable[..., Any])
Policy = Literal["low", "float32"]

# Those that have it. Tracing a graph with torch 2.11 cannot ask.
_DEVICES = ("cpu", "cuda", "xpu", "mps")


def under_autocast(**policies: Policy) -> Callable[[Function], Function]:
    """Under autocast the arguments named come to the function in these dtypes; others as they are.

    Args:
        policies: ``low``, the dtype of autocast, or ``float32``, by the name of a tensor. The first
            of the function's arguments says which device's autocast is meant. As torch does,
            float64 is left alone.
    """

    def decorate(function: Function) -> Function:
        names = list(inspect.signature(function).parameters)
        places = [(names.index(name), name, policy) for name, policy in policies.items()]

        @functools.wraps(function)
        def cast_and_run(*args: Any, **kwargs: Any) -> Any:
            first = args[0] if args else kwargs[names[0]]
            device = first.device.type
            if device not in _DEVICES or not torch.is_autocast_enabled(device):
                return function(*args, **kwargs)
            low = torch.get_autocast_dtype(device)
            dtypes = {"low": low, "float32": torch.float32}
            cast = list(args)
            for place, name, policy in places:
                if place < len(cast):
                    cast[place] = _cast(cast[place], dtypes[policy])
                elif name in kwargs:
                    kwargs[name] = _cast(kwargs[name], dtypes[policy])
            with torch.autocast(device, enabled=False):
                return function(*cast, **kwargs)

        return cast_and_run  # type: ignore[return-value]

    return decorate


def _cast(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return x if x is None or x.dtype == torch.float64 else x.to(dtype)
