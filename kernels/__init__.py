"""The Triton kernels, imported as ``fastgan.kernels``."""

if __name__ != "fastgan.kernels":
    raise ImportError(f"{__name__}: this package is fastgan's; import it as fastgan.kernels")
