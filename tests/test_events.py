"""Events are counted, passed to the listeners, and logged at a limited rate."""

from __future__ import annotations

import logging
from dataclasses import FrozenInstanceError

import pytest

from selfheal import Event, Kind
from selfheal import events as events_module
from selfheal.events import Events


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The monotonic clock; its one element is the time, in seconds."""
    now = [0.0]
    monkeypatch.setattr(events_module.time, "monotonic", lambda: now[0])
    return now


def test_listeners_get_every_event() -> None:
    """Every listener gets every event, in order, with all its fields."""
    first: list[Event] = []
    second: list[Event] = []
    events = Events([first.append, second.append])
    events.emit(Kind.RESTORED, "cats/tom.jpg", 12, "from the database")
    events.emit(Kind.HIT, "a.png")
    assert first == second == [Event(Kind.RESTORED, "cats/tom.jpg", 12, "from the database"), Event(Kind.HIT, "a.png")]


def test_listeners_may_come_from_an_iterator() -> None:
    """Listeners given as an iterator get every event, not only the first."""
    seen: list[Event] = []
    events = Events(iter([seen.append]))
    events.emit(Kind.HIT, "a.png")
    events.emit(Kind.HIT, "b.png")
    assert [event.name for event in seen] == ["a.png", "b.png"]


@pytest.mark.parametrize("listeners", [[], [lambda event: None]], ids=["without listeners", "with a listener"])
def test_everything_is_counted(listeners: list[events_module.Listener]) -> None:
    """Every kind of event is counted, with or without listeners; other kinds are 0."""
    events = Events(listeners)
    for kind in (Kind.HIT, Kind.HIT, Kind.ADOPTED):
        events.emit(kind, "a.png")
    assert events.counters == {Kind.HIT: 2, Kind.ADOPTED: 1}
    assert events.counters[Kind.CORRUPT] == 0
    assert events.counters["hit"] == 2


def test_a_listener_that_raises(caplog: pytest.LogCaptureFixture) -> None:
    """A listener that raises is logged with its traceback; it and the others get the next events too."""
    seen: list[str] = []

    def broken(event: Event) -> None:
        seen.append(f"broken {event.name}")
        raise RuntimeError("an error of the listener")

    events = Events([broken, lambda event: seen.append(event.name)])
    events.emit(Kind.HIT, "a.png")
    events.emit(Kind.HIT, "b.png")
    assert seen == ["broken a.png", "a.png", "broken b.png", "b.png"]
    assert events.counters[Kind.HIT] == 2
    assert [record.name for record in caplog.records] == ["selfheal", "selfheal"]
    assert all(record.exc_info and record.levelno == logging.ERROR for record in caplog.records)
    assert "a.png" in caplog.records[0].getMessage()


def test_an_event_is_a_value() -> None:
    """An event cannot be changed and equals another one with the same fields."""
    event = Event(Kind.SAVED, "a.png", 3)
    assert event == Event(Kind.SAVED, "a.png", 3, "")
    with pytest.raises(FrozenInstanceError):
        event.size = 4  # type: ignore[misc]


def test_kinds_are_words() -> None:
    """Every kind can be the label of a metric."""
    assert f"{Kind.HIT}" == "hit"
    assert all(kind.value == kind.name.lower() and kind.value.isidentifier() for kind in Kind)


def test_one_warning_a_minute(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    """A topic is logged at once, then at most once per minute."""
    events = Events()
    for now in (0.0, 0.1, 59.9, 60.0, 60.1, 119.9, 120.0):
        clock[0] = now
        events.log_once(logging.WARNING, "disk full", f"at {now}")
    assert [(record.levelno, record.getMessage()) for record in caplog.records] == [
        (logging.WARNING, "at 0.0"),
        (logging.WARNING, "at 60.0"),
        (logging.WARNING, "at 120.0"),
    ]


def test_topics_do_not_silence_each_other(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    """Each topic has its own interval, which a call can set."""
    events = Events()
    caplog.set_level(logging.INFO, logger="selfheal")
    events.log_once(logging.WARNING, "disk full", "the disk is full")
    events.log_once(logging.INFO, "database", "the database is down", every=1.0)
    clock[0] = 1.0
    events.log_once(logging.WARNING, "disk full", "the disk is full")
    events.log_once(logging.INFO, "database", "the database is down", every=1.0)
    messages = [record.getMessage() for record in caplog.records]
    assert messages == ["the disk is full", "the database is down", "the database is down"]


def test_a_message_is_not_a_format(caplog: pytest.LogCaptureFixture) -> None:
    """Percent signs in a message, as names may have them, are logged unchanged."""
    Events().log_once(logging.WARNING, "x", "'100%s.png' cannot be read")
    assert [record.getMessage() for record in caplog.records] == ["'100%s.png' cannot be read"]
