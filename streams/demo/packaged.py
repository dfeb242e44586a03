"""The stream that ships with the package: MovieTweetings 100K, with title cards drawn instead of posters."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from streams.demo.title_cards import TitleCards
from trainer.datasets.folder import DataSet, open_data_set

DESCRIPTION = (
    "MovieTweetings 100K (MIT licence, Simon Dooms 2013): real ratings, titles, years and genres. The pictures are "
    "title cards drawn from these by Pillow, not posters."
)


def packaged_folder() -> Path:
    """Where the packaged parquet files lie."""
    return Path(__file__).parent / "data"


def open_packaged() -> DataSet:
    """The packaged stream as a data set; its pictures are drawn on demand."""
    data = open_data_set(packaged_folder(), attributes=("genres", "release_year"), pictures=TitleCards())
    return replace(data, name="movietweetings-100k")
