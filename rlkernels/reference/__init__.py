"""Every op in plain PyTorch: the specification, and, run in float64, the oracle that the kernels are tested against."""
