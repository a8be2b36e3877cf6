"""Options: declared, loaded, checked.

Owns what there is, what was given, where each value comes from, and whether it fits together.
"""
