"""Prompts to text.

Owns decoding: engine, sampling, streaming. Weights come from any format; a layout may be tensor x pipeline parallel."""
