"""Native checkpoints: saved atomically, verified, resharded.

Owns the directory of a run's checkpoints and what makes one complete. Knows no model and no trainer."""
