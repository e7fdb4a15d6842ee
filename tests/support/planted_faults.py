"""Faults planted in the Triton kernels' own source, for tests that must find them."""

from __future__ import annotations

import importlib.util
import types
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from fastgan.ops import triton

# On a GPU a kernel that writes where it should not leaves nothing to be tested.
planted = pytest.mark.skipif(
    bool(triton.missing_reasons()) or not triton.interpreted(),
    reason="faults are planted where the kernels are interpreted",
)
# What KernelMemoryError says of them, and what an assertion on an error does.
OUTSIDE, RACE, DUPLICATES, NUMBERS = "out-of-bounds", "race: ", "duplicate addresses", " <= "


class Fault(NamedTuple):
    """``new`` in the place of ``old``, which ``function`` has once; ``check`` finds it."""

    function: str
    old: str
    new: str
    check: str
    found: str

    def plant(self, patch: pytest.MonkeyPatch, op: str, folder: Path) -> None:
        """Until ``patch`` is undone, the kernels of ``op`` are those of a faulty copy."""
        module = triton.kernels(op)
        text = Path(module.__file__).read_text(encoding="utf-8")
        start = text.index(f"def {self.function}(")
        end = text.find("\n\n\n", start)
        source = text[start:end]
        times = source.count(self.old)
        assert times == 1, f"{self.function} has {times} times what is to be replaced: {self.old}"
        path = folder / f"{op}.py"
        path.write_text(text[:start] + source.replace(self.old, self.new) + text[end:])
        faulty = _imported(module.__name__, path)
        for name, value in list(vars(faulty).items()):
            if isinstance(value, int):
                # Which the test may have set.
                setattr(faulty, name, getattr(module, name))
            # Its classes are as they were, and what is made of them compares by them.
            elif callable(value) and not isinstance(value, type):
                patch.setattr(module, name, value)


def _imported(name: str, path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module: types.ModuleType = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def faults(*all_faults: Fault) -> pytest.MarkDecorator:
    """The parameter ``fault``, each named by where it is and what it writes."""
    return pytest.mark.parametrize(
        "fault", [pytest.param(f, id=f"{f.function}: {f.new}"[:90]) for f in all_faults]
    )
