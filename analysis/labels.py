"""Arms, and how each is shown: its label, its colour and its place, the same in tables, figures and the page.

An arm is a method with one variant of its settings, as it is set or as it was selected after training: what a column, a
curve or a rank is of. Runs of two arms are never averaged together.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

from aepo import method_table
from aepo.method_table import Row
from aepo.results import selected_name


class Arm(NamedTuple):
    """A method with one variant of its settings."""

    method: str
    variant: str = ""
    """The variant's name; empty for the method's settings as they are."""
    selected_episodes: int = 0
    """Episodes on which each run selected how to act; 0 = it acts as it is set."""

    @property
    def label(self) -> str:
        """The arm's name in tables and figures, as `AEPO, w 3`; a method that is not known goes by its own name."""
        label = next((row.label for row in known() if row.method == self.method), self.method)
        return selected_name(_joined(label, self.variant), self.selected_episodes)

    def __str__(self) -> str:
        """Return the arm's name in messages and files, as `aepo, w 3`."""
        return selected_name(_joined(self.method, self.variant), self.selected_episodes)


OTHER_COLOURS = ("#000000", "#F0E442", "#882255", "#44AA99", "#999933", "#AA4499")
"""Colours of methods without one of their own: the palette's last two and then Tol's muted ones."""
LIGHTEST = 0.6
"""Share of white in the colour of a method's last variant."""


def known() -> tuple[Row, ...]:
    """Return the methods in the order of tables: those of methods.csv, then those that other packages bring."""
    return tuple(method_table.rows().values())


def in_order(arms: Iterable[Arm]) -> list[Arm]:
    """Return each arm once: known methods first, then others by name; numbers in a variant's name count as numbers."""
    places = {row.method: place for place, row in enumerate(known())}
    return sorted(
        set(arms),
        key=lambda arm: (
            places.get(arm.method, len(places)),
            arm.method,
            *_natural(arm.variant),
            arm.selected_episodes,
        ),
    )


def colours(arms: Iterable[Arm]) -> dict[Arm, str]:
    """Return the colour of each arm, in order: a method's own for its first variant, lighter ones for the further.

    Methods without a colour of their own take those of OTHER_COLOURS in the order of tables.
    """
    found = in_order(arms)
    own = {row.method: row.colour for row in known() if row.colour}
    others = dict.fromkeys(arm.method for arm in found if arm.method not in own)
    own |= {method: OTHER_COLOURS[place % len(OTHER_COLOURS)] for place, method in enumerate(others)}
    shades = {}
    for method in dict.fromkeys(arm.method for arm in found):
        variants = [arm for arm in found if arm.method == method]
        for place, arm in enumerate(variants):
            shades[arm] = _lighter(own[method], LIGHTEST * place / max(1, len(variants) - 1))
    return shades


def _joined(method: str, variant: str) -> str:
    return f"{method}, {variant}" if variant else method


def _natural(text: str) -> tuple[list[str | float], str]:
    """Return a key by which "w 3" stands before "w 10"; the text itself tells "w 3" from "w 3.0"."""
    parts = re.split(r"([0-9]+(?:\.[0-9]+)?)", text)
    return [float(part) if place % 2 else part for place, part in enumerate(parts)], text


def _lighter(colour: str, share: float) -> str:
    """Return #RRGGBB mixed with a share of white."""
    parts = (int(colour[place : place + 2], 16) for place in (1, 3, 5))
    return "#" + "".join(f"{round(part + (255 - part) * share):02X}" for part in parts)
