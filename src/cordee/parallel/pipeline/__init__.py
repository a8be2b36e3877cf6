"""The pipeline: stages of the model on different ranks, and in which order they work."""
