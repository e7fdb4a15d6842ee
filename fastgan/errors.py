"""The three ways fastgan refuses or gives up. Each message names the argument, its value, the mend.

The command line turns the first two into one line and exit code 2, the third into exit code 1.
"""


class InputError(ValueError):
    """An argument, file or data set that cannot be used as it is."""


class NotBuiltError(NotImplementedError):
    """A documented value whose implementation this version does not have yet."""


class RunError(RuntimeError):
    """A training run that had to stop: a loss that is not finite, a disk that is full."""
