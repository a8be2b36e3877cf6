"""What is computed.

Owns the modules and the seams through which everything else enters. Runs in one process; knows no rank."""
