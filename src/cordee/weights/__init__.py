"""Checkpoint formats as readers and writers.

Owns how the bytes of every format become canonical tensors and back, in bounded memory, running no code of strangers.
"""
