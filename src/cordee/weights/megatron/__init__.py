"""Megatron's checkpoints, one directory a rank, in every dialect: read and written."""
