"""The rows of methods.csv and the methods that other packages bring: names, labels, colours. Loads no torch.

A method of another package has no row. Its name stands in that package's metadata instead, under the entry point
group `aepo.methods`, as in `mine = "my_package.mine:MINE"`; its preset has the method's name, and so has its label.
"""

import csv
import dataclasses
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from importlib.resources import files

from aepo.errors import ConfigError

GROUP = "aepo.methods"
"""The entry point group of methods from other packages."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """A line of methods.csv, or a method of another package."""

    method: str
    """The name in configs, tables and files."""
    preset: str = ""
    """The name of the method's preset without its budget; empty for what is only evaluated (diffusion-bc)."""
    label: str
    """The name in tables and figures."""
    colour: str = ""
    """The colour in figures, #RRGGBB; empty = one of the figures' further colours."""
    published: str = ""
    """The published column that stands beside the method in the table of a benchmark; empty = none."""
    object: str = ""
    """Where the Method object is, as in `package.module:NAME`."""


@cache
def rows() -> dict[str, Row]:
    """Return method -> its row, those of methods.csv first, in the order of tables and figures."""
    text = files("aepo").joinpath("methods", "methods.csv").read_text(encoding="utf-8")
    own = [Row(**line) for line in csv.DictReader(text.splitlines())]
    found = {row.method: row for row in own}
    for point in sorted(entry_points(group=GROUP), key=lambda point: point.name):
        if point.name in found or point.name in {row.preset for row in own}:
            raise ConfigError(f"the method {point.name!r} of {point.value} has a name that aepo uses; rename it")
        if not point.name.isidentifier() or point.name != point.name.lower():
            raise ConfigError(
                f"the method {point.name!r} of {point.value} wants a name of lower-case letters, digits and _"
            )
        found[point.name] = Row(method=point.name, preset=point.name, label=point.name, object=point.value)
    return found


def presets() -> dict[str, str]:
    """Return preset name, without its budget -> method."""
    return {row.preset: row.method for row in rows().values() if row.preset}


def preset_help(default: str) -> str:
    """Return what a flag's help says of presets."""
    named = ", ".join(f"{preset} ({rows()[method].label})" for preset, method in presets().items())
    return (
        f"METHOD, BUDGET or METHOD-BUDGET. Methods: {named}; {default} if left out. Budgets: paper (days on a CPU), "
        "quick (minutes), smoke (seconds; scores mean nothing)."
    )


def load(method: str) -> object:
    """Return the object of a method's row.

    Raises:
        ConfigError: for a name that no row has, or an object that cannot be imported.
    """
    row = rows().get(method)
    if row is None or not row.object:
        known = [row.method for row in rows().values() if row.object]
        raise ConfigError(f"method must be one of {', '.join(known)}, got {str(method)[:40]!r}")
    try:
        return EntryPoint(name=method, value=row.object, group=GROUP).load()
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"the method {method!r} cannot be loaded from {row.object}: {error}") from error
