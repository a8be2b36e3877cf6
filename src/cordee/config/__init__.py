"""Options: what there is, what was given, where it comes from, and whether it fits together."""
