"""Tasks that score a model.

Owns requests to a model, the tasks that make them and their scores."""
