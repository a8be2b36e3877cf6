"""Text to tokens to batches: readers, indexed datasets, sample order, loading.

Owns everything between a user's files and the tensors of a micro-batch. Knows nothing of models, ranks or process
groups: who reads which samples is told to it as numbers.
"""
