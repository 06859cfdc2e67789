"""Colours: of the PNGs, and of the SVGs, whose colours are CSS variables of the page."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Theme:
    """Colours by role. `series` are told apart by colour-blind readers too (after Okabe and Ito)."""

    surface: str
    ink: str
    muted: str
    grid: str
    series: tuple[str, ...]

    def roles(self) -> dict[str, str]:
        """CSS variable to colour."""
        named = {"surface": self.surface, "ink": self.ink, "muted": self.muted, "grid": self.grid}
        return named | {f"series-{i + 1}": colour for i, colour in enumerate(self.series)}


LIGHT = Theme(
    surface="#ffffff",
    ink="#1c2430",
    muted="#5a6675",
    grid="#e3e7ec",
    series=(
        "#0067a8",
        "#c9500a",
        "#00835f",
        "#a8518a",
        "#9a6b00",
        "#3d8fc4",
        "#6b4fb3",
        "#b3123f",
        "#4f7a1a",
    ),
)
DARK = Theme(
    surface="#171b21",
    ink="#e6eaf0",
    muted="#a0abb8",
    grid="#2d343d",
    series=(
        "#56aee8",
        "#f08a4b",
        "#35c79c",
        "#e39bc6",
        "#e8b93c",
        "#9ad0f2",
        "#b39df0",
        "#ff7d9c",
        "#b0d86a",
    ),
)
# Colours that occur nowhere else: `with_variables` puts CSS variables in their place.
PLACEHOLDERS = Theme(
    surface="#0101f0",
    ink="#0101f1",
    muted="#0101f2",
    grid="#0101f3",
    series=tuple(f"#0102f{i}" for i in range(8)),
)


def with_variables(svg: str) -> str:
    """Replace every placeholder colour of an SVG by the page's variable of that role."""
    for role, colour in PLACEHOLDERS.roles().items():
        svg = svg.replace(colour, f"var(--{role})")
    return svg
