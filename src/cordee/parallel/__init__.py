"""Layouts: who holds and computes what.

Owns meshes, collectives and every technique that spreads a model over ranks; `apply.py` has their order."""
