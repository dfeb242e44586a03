"""Plots for HTML reports."""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def as_image(figure: Figure) -> str:
    """An `img` element that holds the figure as SVG; the same figure gives the same bytes."""
    from matplotlib import rc_context  # slow to import

    drawn = io.BytesIO()
    with rc_context({"svg.hashsalt": "mimstream"}):  # names of elements are drawn by chance without one
        figure.savefig(drawn, format="svg", metadata={"Date": None})
    return f"<img class='plot' alt='' src='data:image/svg+xml;base64,{base64.b64encode(drawn.getvalue()).decode()}'>"
