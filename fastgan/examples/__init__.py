"""fastgan inside other training code: short programs, each complete, to read and to run."""
