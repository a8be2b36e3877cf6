"""Weights from any format to any other.

Owns the command: which reader, which writer, what their options must agree on. The formats are `weights`'."""
