"""The whole way on one machine: text to a trained model that writes.

Owns the example run and its report; every step is the command that a user would give."""
