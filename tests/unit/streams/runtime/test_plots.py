"""Plots of reports."""

from __future__ import annotations

from matplotlib.figure import Figure

from streams.runtime.plots import as_image


def plot(*values: float) -> Figure:
    figure = Figure(figsize=(1, 1))
    figure.subplots().plot(values, marker=".")
    return figure


def test_the_same_figure_gives_the_same_bytes_and_another_one_others() -> None:
    first, again, other = as_image(plot(1, 2)), as_image(plot(1, 2)), as_image(plot(2, 1))
    assert first == again != other and first.startswith("<img class='plot' alt='' src='data:image/svg+xml;base64,")
