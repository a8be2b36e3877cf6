"""One file per optimization algorithm.

Each has `ALGORITHMS`: by the value of --optimizer, a function `(options, groups, fused) -> Optimizer`, where `groups`
are torch's parameter groups and `fused` says whether the device has fused optimizers.
"""
