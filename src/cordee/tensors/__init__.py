"""The algebra that weights and families share: slices of tensors, and rules between names.

Owns how tensors of a format are views of canonical ones. Knows no format and no model, and never imports torch."""
