"""Measurements for whoever changes Cordée: what a seam, a kernel or a schedule costs, beside its peers.

`python -m benchmarks SUITE`, from the root of a checkout. What a user measures on the own machine is `cordee bench`.
"""
