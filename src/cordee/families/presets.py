"""The published models of every family, which are rows of `presets.yaml`. Knows no family."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cordee.families.family import HFConfig, Preset

BY_ROW = "row"  # the value of a key that each row sets


@functools.cache
def _tables() -> dict[str, dict[str, Any]]:
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast, where PyYAML has it
    return yaml.load(Path(__file__).with_suffix(".yaml").read_bytes(), loader)


def published(family: str) -> dict[str, Preset]:
    """The presets of a family by name, in the order of its table."""
    return read_table(_tables().get(family, {}))


def read_table(table: Mapping[str, Any]) -> dict[str, Preset]:
    """The presets of a table: `usual` is the configuration that they share, every other name a row."""
    return {name: read_row(table["usual"], row) for name, row in table.items() if name != "usual"}


def read_row(usual: HFConfig, row: list[Any]) -> Preset:
    """The `usual` configuration with a row's values of the keys that are "row", in order, and then its differences."""
    values = iter(value for value in row if not isinstance(value, dict))
    config = {key: next(values) if value == BY_ROW else value for key, value in usual.items()}
    for differences in (part for part in row if isinstance(part, dict)):
        config |= differences
    assert next(values, None) is None, f"too many values in {row}"
    return Preset(licence=config.pop("licence"), config=config)
