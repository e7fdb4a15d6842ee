"""The precision of a step: its dtypes, the rounding of its products, the scale of its gradients.

Weights, their updates, statistics of batch norms and the loss are float32 in every one of them.
``bf16`` and ``fp16`` run the networks under autocast. float16 ends at 65504 above and at 6e-8
below, so that losses are scaled before they are differentiated, each optimiser's by a scale of its
own: one network's overflow does not hold up the other's update. An update with a gradient that is
not finite is skipped and the scale halved, all on the device (Micikevicius et al. 2018,
https://arxiv.org/abs/1710.03740).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastgan import choices
from fastgan.errors import InputError
from fastgan.saying import say_once

_LOW = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Precision:
    """One precision on one device.

    Args:
        name: ``fp32``, ``tf32``, ``bf16`` or ``fp16``.
        device: where the step runs.
        networks: those that it runs, by name; their parameters must be float32 for ``bf16`` and
            ``fp16``.

    Attributes:
        low: what autocast computes in, or None.

    Raises:
        InputError: the device, or a network's parameters, cannot be used with it.
    """

    def __init__(
        self, name: choices.Precision, device: torch.device, **networks: nn.Module
    ) -> None:
        self.name = name
        self.low = _LOW.get(name)
        self._device = device
        if reason := unsupported_reason(name, device):
            raise InputError(f"precision={name!r} {reason}")
        if self.low is not None:
            for of, network in networks.items():
                _require_float32(name, of, network)
        if said := remark(name, device):
            say_once(f"precision={name!r}: {said}")

    @contextlib.contextmanager
    def products(self) -> Iterator[None]:
        """Within, float32 is multiplied as this precision says, as well in backward passes."""
        if self.name != "tf32":
            yield
            return
        kinds: tuple[Any, ...] = (torch.backends.cudnn.conv, torch.backends.cuda.matmul)  # type: ignore[attr-defined]
        before = [kind.fp32_precision for kind in kinds]
        try:
            for kind in kinds:
                kind.fp32_precision = "tf32"
            yield
        finally:
            for kind, precision in zip(kinds, before, strict=True):
                kind.fp32_precision = precision

    def forward(self) -> contextlib.AbstractContextManager[Any]:
        """Within, the networks compute in this precision. For forward passes alone."""
        if self.low is None:
            return contextlib.nullcontext()
        # A captured step would find casts in the cache that it has not made itself.
        return torch.autocast(self._device.type, dtype=self.low, cache_enabled=False)

    def updater(self, optimizer: torch.optim.Optimizer) -> Updater:
        """What differentiates a loss and updates by ``optimizer``."""
        if self.name == "fp16":
            return ScaledUpdater(optimizer, self._device)
        return Updater(optimizer)


class Updater:
    """Updates by one optimiser.

    Attributes:
        state: what it keeps on the device, for :func:`fastgan.capture_step`.
    """

    state: tuple[torch.amp.GradScaler, ...] = ()

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of ``loss``."""
        loss.backward()

    def gradient_norm(self, parameters: Iterable[Tensor]) -> Tensor:
        """The norm ``[1]`` of all gradients there are; of float32, on the device."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        return torch.stack(torch._foreach_norm(gradients)).float().norm().reshape(1)

    def step(self) -> None:
        """Takes the optimiser's step."""
        self._optimizer.step()

    def state_dict(self) -> dict[str, Any] | None:
        """What a resume needs; None where there is nothing."""
        return None

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Go on from what :meth:`state_dict` returned."""


class ScaledUpdater(Updater):
    """Updates by one optimiser from gradients that are multiplied by a scale of its own."""

    def __init__(self, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
        super().__init__(optimizer)
        self._scaler = torch.amp.GradScaler(device.type)
        # It makes its tensors when it is first used: here, and not while a step is captured.
        self._scaler.scale(torch.zeros((), device=device))
        self.state = (self._scaler,)

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of ``loss``, scaled."""
        self._scaler.scale(loss).backward()

    def gradient_norm(self, parameters: Iterable[Tensor]) -> Tensor:
        """That of the gradients without their scale."""
        norm = super().gradient_norm(parameters)
        return norm / self._scaler.scale(torch.ones_like(norm))

    def step(self) -> None:
        """Takes the optimiser's step where all gradients are finite, and adapts the scale."""
        self._scaler.step(self._optimizer)
        self._scaler.update()

    def state_dict(self) -> dict[str, Any] | None:
        """The scale, and how long it has held."""
        return self._scaler.state_dict()

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Go on from what :meth:`state_dict` returned; from None as at first."""
        if state:
            self._scaler.load_state_dict(state)


def _require_float32(precision: str, name: str, network: nn.Module) -> None:
    for key, p in network.named_parameters():
        if p.dtype != torch.float32:
            dtype = str(p.dtype).removeprefix("torch.")
            raise InputError(
                f"precision={precision!r} keeps float32 weights, and {name}.{key} is {dtype}; give "
                f"{name}.float(), or precision='fp32' to compute in the dtype of the weights"
            )


def unsupported_reason(name: str, device: torch.device) -> str:
    """Why the precision ``name`` cannot be had on ``device``, and the mend; empty where it can."""
    if name == "fp16" and device.type == "cpu":
        return "needs a GPU; on the CPU use 'bf16' or 'fp32'"
    return ""


def remark(name: str, device: torch.device) -> str:
    """What is to be known of the precision ``name`` on ``device``; empty where that is nothing."""
    if device.type == "cpu" and name == "tf32":
        return "TF32 is of GPUs; on the CPU the step computes in float32"
    if device.type == "cpu" and name == "bf16":
        found = torch.cpu.get_capabilities()
        if not any(found.get(key, False) for key in ("avx512_bf16", "amx_bf16", "bf16")):
            return (
                "this CPU has no instructions for it and emulates it, slowly; 'fp32' is faster here"
            )
    return ""
