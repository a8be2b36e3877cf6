"""Options: declared, loaded, checked.

Owns how options are declared, what was given, where each value comes from, and whether it fits together. Knows none:
they stand in the `options.py` of the package that they concern. There the field name is the YAML key and, with dashes,
the flag; it is Megatron's name wherever Megatron has one. `None` means "not given". A boolean is stated positively and
also has a `--no-...` flag, so Megatron's `--no-load-optim` is `load_optim: false`."""
