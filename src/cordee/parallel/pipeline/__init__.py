"""Pipeline parallelism: stages of the model on different ranks.

Options: `--pipeline-*`, `--num-layer-list`, `--noop-layers`, `--fold-mode`, `--manual-mbs` (options.py). Laws:
`check.py`, which asks `split.py` (stages), `schedules.py` and `micro_batches.py`. Instead of an `apply` a rank builds
only its spans of layers, and `executor.py` runs them. Cost: `cordee.plan` simulates the schedule."""
