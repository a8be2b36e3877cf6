"""Optimizers and schedules.

Owns parameter groups, mixed precision, clipping, learning rates."""
