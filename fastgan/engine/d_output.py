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

    Attributes:
        kind: ``logits`` or ``probability``: what a call within :meth:`logits` returns.

    Raises:
        InputError: ``auto`` cannot tell which it is.
    """

    def __init__(self, netD: nn.Module, sample: Tensor, requested: str = "auto") -> None:
        if requested == "auto":
            requested = getattr(netD, "d_output", "auto")
        self.kind = "logits"
        self._skip: int | None = None
        if requested == "logits":
            return
        self._skip = self._final_sigmoid(netD, sample, required=requested == "auto")
        if requested == "probability" and self._skip is None:
            self.kind = "probability"

    @contextlib.contextmanager
    def logits(self) -> Iterator[None]:
        """Within this context a call of ``netD`` leaves out its final sigmoid, if it has one."""
        if self._skip is None:
            yield
        else:
            with _CountSigmoids(self._skip):
                yield

    @staticmethod
    def _final_sigmoid(netD: nn.Module, sample: Tensor, required: bool) -> int | None:
        """The number of the sigmoid call that ends ``netD``'s forward; None if it has none."""
        with evaluation_mode(netD), torch.enable_grad():
            with _CountSigmoids() as seen:
                output = netD(sample)
            last = _last_operation(output.grad_fn)
            if last == "logits":
                return None
            if last == "sigmoid" and seen.calls:
                skip = seen.calls - 1
                with _CountSigmoids(skip):
                    logits = netD(sample)
                # The last call made need not be the last operation: take it only if it checks out.
                if torch.equal(logits.sigmoid(), output):
                    return skip
        if required:
            raise InputError(
                f'd_output="auto": cannot tell whether netD ({type(netD).__name__}) returns logits '
                f"or probabilities, its last operation is {last}; {_ASK}"
            )
        return None


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
