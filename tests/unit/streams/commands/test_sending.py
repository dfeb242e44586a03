"""`replay` and `import`: what they hand to the sender, and what they tell of what was left out."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from schemas.errors import Misconfigured
from streams.commands import import_, replay
from streams.replay.sender import Sent
from streams.settings import Settings
from tests.factories.commands import SETTINGS, call


class Published:
    """A folder that is sent without a broker."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, sent: Sent) -> None:
        self.timelines: list[Any] = []
        self.sent_with: list[Any] = []
        self.drawn: list[Any] = []
        data = SimpleNamespace(name="a set", without_user=3, left_out="3 rows are left out")
        taken = SimpleNamespace(drawn_from="drawn by seed 3")

        def opened(folder: Path, **more: Any) -> Any:
            self.drawn.append((folder, more))
            return data

        def behaviours(_: Any, **more: Any) -> Any:
            self.drawn.append(more)
            return taken

        def timeline(*given: Any) -> Any:
            self.timelines.append(given)
            return SimpleNamespace(refuse_field_maps=lambda *maps: self.timelines.append(maps))

        async def send(_: Any, __: Settings, follow: list[str], speed: float | None) -> Sent:
            self.sent_with.append((follow, speed))
            return sent

        for module in (replay, import_):
            monkeypatch.setattr(module, "open_data_set", opened)
        monkeypatch.setattr(replay, "behaviours_of", behaviours)
        monkeypatch.setattr(replay, "Timeline", timeline)
        monkeypatch.setattr(replay, "send", send)


def test_a_replay_sends_what_its_options_say_and_counts_what_was_left_out(
    monkeypatch: pytest.MonkeyPatch, said: Any
) -> None:
    sent = Sent(items=1_200, behaviours=34, broken={("items", 0, 1): "x"}, without_picture={"i1", "i2"})  # type: ignore[dict-item]
    sent.records_left_out, sent.without_query_image = 5, 7
    published = Published(monkeypatch, sent)
    monkeypatch.setitem(SETTINGS.index.field_map, "title", ["name"])  # type: ignore[arg-type]
    monkeypatch.setitem(SETTINGS.record.field_map, "user_id", ["visitor"])  # type: ignore[arg-type]
    flags = ("--seed", "3", "--events", "50", "--neg-type", "rand", "--broken", "0.1", "--speed", "2.5")
    assert call(replay, "d", *flags, "--follow", "index,train") == 0
    told = said()
    assert "a set: 1,200 items and 34 behaviours sent" in told and "1 of them broken on purpose" in told
    assert "of the folder, 3 rows are left out" in told
    for words in ("2 pictures", "7 photos of searches", "5 records, which were not sent", "drawn by seed 3"):
        assert words in told
    assert published.drawn == [
        (Path("d"), {"neg_type": "rand"}), {"seed": 3, "events": 50, "retakes": True}
    ]  # fmt: skip
    given, maps = published.timelines
    assert given[2] == 3 and given[4] == 0.1 and given[1].drawn_from == "drawn by seed 3"
    assert maps == ({"title": ["name"]}, {"user_id": ["visitor"]})
    assert published.sent_with == [(["index", "train"], 2.5)]
    assert call(replay, "d", "--json") == 0
    report = said(as_json=True)
    del report["wall_seconds"]
    assert report == {
        "data": "a set", "items_published": 1_200, "behaviours_sent": 34, "broken": 1, "pictures_left_out": 2,
        "query_images_left_out": 7, "rows_without_user": 3,
        "records_left_out": 5, "exposures_drawn": "drawn by seed 3",
    }  # fmt: skip


@pytest.mark.parametrize(("pictures", "records", "told"), [(set(), 0, False), ({"i"}, 0, True), (set(), 1, True)])
def test_an_import_sends_items_alone_and_tells_of_either_loss(
    monkeypatch: pytest.MonkeyPatch, said: Any, pictures: set[str], records: int, told: bool
) -> None:
    published = Published(monkeypatch, Sent(items=3, without_picture=pictures, records_left_out=records))
    assert call(import_, "d") == 0
    assert ("too large for MIM_KAFKA__MAX_RECORD_BYTES" in said()) == told
    assert published.drawn == [(Path("d"), {"behaviours": False})] and published.timelines[0][1] is None
    assert published.sent_with == [([], None)]


@pytest.mark.parametrize("speed", ["0", "-1"])
def test_a_replay_that_stands_still_is_refused(speed: str) -> None:
    with pytest.raises(Misconfigured, match="--speed"):
        call(replay, "d", f"--speed={speed}")
