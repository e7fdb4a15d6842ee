"""The values that named options take. Free of torch, so that a wrong one is refused at once."""

from typing import Literal

Backend = Literal["auto", "reference", "cpp", "triton", "cuda"]
Capture = Literal["auto"] | bool
Condition = Literal["none", "planes", "projection"]
DOutput = Literal["auto", "logits", "probability"]
FusePasses = Literal["auto"] | bool
Loss = Literal["bce", "minimax", "lsgan", "hinge", "wgan-gp"]
NormD = Literal["batch", "none"]
Precision = Literal["fp32", "tf32", "bf16", "fp16"]
