"""Operators, each beside its reference.

Owns kernels and the choice among them by capability."""
