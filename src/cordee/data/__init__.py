"""Text to tokens to batches: readers, indexed datasets, sample order, loading.

Owns everything between a user's files and the tensors of a micro-batch. Knows nothing of models, ranks or process
groups: which samples a rank reads is given as numbers."""
