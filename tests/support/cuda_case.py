"""Calls a function: ``python -m support.cuda_case MODULE:NAME [ARGUMENT ...]``.

For processes under a sanitizer, which start by importing no more than the function needs.
"""

from __future__ import annotations

import importlib
import sys


def main() -> None:
    module, name = sys.argv[1].split(":")
    getattr(importlib.import_module(module), name)(*sys.argv[2:])


if __name__ == "__main__":
    main()
