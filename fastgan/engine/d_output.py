"""What a discriminator returns, logits or probabilities, and how to get at its logits.

The loss works on logits: a discriminator that ends in a sigmoid and is trained under a loss on
logits learns the wrong thing without a sign. So the last operation is looked up in the autograd
graph of one small batch, and a final sigmoid is skipped at each call from then on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastgan.errors import InputError
from fastgan.nn.modes import evaluation_mode
from fastgan.ops.backend import use_backend

# Nodes that only give the same numbers another shape or layout.
_SHAPE_NODES = frozenset(
    {
        *("ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0", "AliasBackward0"),
        *("SqueezeBackward0", "SqueezeBackward1", "SqueezeBackward2", "UnsqueezeBackward0"),
        *("SelectBackward0", "SliceBackward0", "PermuteBackward0", "TransposeBackward0"),
        *("CloneBackward0", "TBackward0", "ExpandBackward0", "ToCopyBackward0"),
    }
)
# Nodes whose output has no bounds, as a logit has none.
_LINEAR_NODES = frozenset(
    {
        *("ConvolutionBackward0", "MkldnnConvolutionBackward0", "CudnnConvolutionBackward0"),
        *("AddmmBackward0", "MmBackward0", "MvBackward0", "AddmvBackward0", "DotBackward0"),
        *("BmmBackward0", "BaddbmmBackward0", "LinearBackward0"),
    }
)
_SIGMOIDS = frozenset({torch.sigmoid, torch.sigmoid_, Tensor.sigmoid, Tensor.sigmoid_, F.sigmoid})

_ASK = 'pass d_output="logits" or d_output="probability" to say which it returns'


class _CountSigmoids(TorchFunctionMode):
    """Counts the calls of sigmoid; the one numbered ``skip`` returns its input."""

    def __init__(self, skip: int | None = None) -> None:
        super().__init__()
        self.skip = skip
        self.calls = 0

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func in _SIGMOIDS:
            self.calls += 1
            if self.calls - 1 == self.skip:
                return args[0]
        return func(*args, **(kwargs or {}))


class DiscriminatorOutput:
    """How to call ``netD`` so that it gives what the loss wants.

    Args:
        netD: the discriminator.
        sample: ``[n, C, H, W]``, a few images of the kind it will see.
        requested: ``auto``, ``logits`` or ``probability``.
        given: what ``netD`` is called with after the images, such as their labels.

    Attributes:
        kind: ``logits`` or ``probability``: what a call within :meth:`logits` returns.

    Raises:
        InputError: ``auto`` cannot tell which it is, or ``probability`` is not what it returns.
    """

    def __init__(
        self,
        netD: nn.Module,
        sample: Tensor,
        requested: str = "auto",
        given: tuple[Tensor, ...] = (),
    ) -> None:
        self.kind = "logits"
        self._skip: int | None = None
        if requested == "logits":
            return
        last, scores = self._find_final_sigmoid(netD, (sample, *given))
        if self._skip is not None or (last == "logits" and requested == "auto"):
            return
        if requested == "auto":
            raise InputError(
                f'd_output="auto": cannot tell whether netD ({type(netD).__name__}) returns logits '
                f"or probabilities, its last operation is {last}; {_ASK}"
            )
        low, high = scores.min().item(), scores.max().item()
        if last == "logits" or not 0.0 <= low <= high <= 1.0:
            raise InputError(
                f'd_output="probability": netD ({type(netD).__name__}) returned values from '
                f'{low:g} to {high:g}, its last operation is {last}; pass d_output="logits"'
            )
        self.kind = "probability"

    @contextlib.contextmanager
    def logits(self) -> Iterator[None]:
        """Within this context a call of ``netD`` leaves out its final sigmoid, if it has one."""
        if self._skip is None:
            yield
        else:
            with _CountSigmoids(self._skip):
                yield

    def _find_final_sigmoid(self, netD: nn.Module, given: tuple[Tensor, ...]) -> tuple[str, Tensor]:
        """What ``netD`` ends in and what it returns; sets the sigmoid to skip if it ends in one."""
        # Plain torch's graph is what can be read.
        with evaluation_mode(netD), torch.enable_grad(), use_backend("reference"):
            with _CountSigmoids() as seen:
                scores = netD(*given)
            last = _last_operation(scores.grad_fn)
            if last == "sigmoid" and seen.calls:
                with _CountSigmoids(seen.calls - 1):
                    logits = netD(*given)
                # The last call made need not be the last operation: take it only if it checks out.
                if torch.equal(logits.sigmoid(), scores):
                    self._skip = seen.calls - 1
        return last, scores.detach()


def _last_operation(node: Any) -> str:
    """``logits``, ``sigmoid``, or the name of an operation that tells neither."""
    while node is not None and node.name() in _SHAPE_NODES:
        node = node.next_functions[0][0]
    if node is None:
        return "not differentiable"
    name = node.name()
    if name == "SigmoidBackward0":
        return "sigmoid"
    if name in _LINEAR_NODES:
        return "logits"
    if name == "AddBackward0":
        # A bias or the sum of two scores: unbounded if every term that is computed is.
        terms = [edge for edge, _ in node.next_functions if edge is not None]
        terms = [edge for edge in terms if edge.name() != "torch::autograd::AccumulateGrad"]
        if terms and all(_last_operation(edge) == "logits" for edge in terms):
            return "logits"
    if name in ("MeanBackward0", "MeanBackward1") and (
        _last_operation(node.next_functions[0][0]) == "logits"
    ):
        return "logits"
    return name
