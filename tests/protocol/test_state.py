"""The pure state of a server: order of service, replay buffer, tombstones, sessions, fences."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.calls import Calls, Request, Tombstones, Waiting
from protocol.codec import Payload, ReplyHeader
from protocol.errors import UnavailableError
from protocol.handling import Route
from protocol.messages import Ack, Body
from protocol.server import Call
from protocol.sessions import Fences, Session, Sessions
from protocol.window import FIRST_CREDIT, Change, Window


async def handler(call: Call, body: Body) -> Body:
    return Ack()


def request(name: str, priority: int = 0) -> Request:
    return Request(name, Route("x", Body, handler, priority), Session(b"c", "k", 8), 0.0)


@given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), max_size=40))
def test_waiting_serves_by_priority_then_age(pushed: list[tuple[int, bool]]) -> None:
    waiting, expected = Waiting(), []
    for number, (priority, removed) in enumerate(pushed):
        one = request(str(number), priority)
        waiting.push(one)
        if removed:
            assert waiting.remove(one) and not waiting.remove(one)
        else:
            expected.append((-priority, number, one.id))
    assert len(waiting) == len(expected)
    served = [one.id for one in iter(waiting.pop, None)]
    assert served == [name for *_, name in sorted(expected)] and not waiting


ACTION = st.tuples(st.sampled_from(["reply", "finish", "ack", "expire"]), st.integers(0, 4), st.integers(0, 8))


@settings(max_examples=200, deadline=None)
@given(st.lists(ACTION, max_size=80))
def test_the_replay_buffer_keeps_its_bounds_and_its_order(actions: list[tuple[str, int, int]]) -> None:
    calls, now, last = Calls(max_bytes=2000, max_finished=2, keep_s=5.0), 0.0, Payload(b"x" * 100, (), 100)
    for action, which, number in actions:
        one = calls.known.get(str(which))
        if one is None:
            one = request(str(which))
            calls.add(one)
        match action:
            case "reply" if one.finished_at is None:
                calls.append(one, "reply", last if number else UnavailableError("x"))
            case "finish" if one.finished_at is None:
                calls.append(one, "done", last)
                calls.finish(one, now)
            case "ack":
                calls.acknowledge(one.id, number)
            case "expire":
                now += number
                calls.expire(now)
        assert calls.bytes == sum(r.nbytes for q in calls.known.values() for r in q.replies)
        assert calls.bytes <= 2000 and len(calls.finished) <= 2
        assert all(q.finished_at is not None and q.finished_at + 5.0 > now - 8 for q in calls.finished.values())
        for q in calls.known.values():
            held = [r.seq for r in q.replies]
            assert held == list(range(q.first_held, q.next_seq))


def test_tombstones_are_bounded_in_number_and_time() -> None:
    tombs = Tombstones(maximum=3, keep_s=10.0)
    for number in range(5):
        tombs.add(str(number), now=number)
    assert len(tombs) == 3 and not tombs.covers("1", 4.0) and tombs.covers("2", 4.0)
    assert not tombs.covers("2", 12.0)
    tombs.expire(13.5)
    assert len(tombs) == 1 and tombs.covers("4", 13.5)


def test_sessions_are_bounded_and_busy_ones_stay() -> None:
    sessions = Sessions("n", window=4, maximum=2)
    a, b = sessions.of(b"a"), sessions.of(b"b")
    assert a is not None and b is not None and a.credit == 4 and sessions.of(b"a") is a
    a.received = b.received = 1
    assert sessions.of(b"c") is None
    a.finished = 1
    assert a.credit == 5
    c = sessions.of(b"c")
    assert c is not None and len(sessions) == 2
    c.received = c.finished = 1
    again = sessions.of(b"a")
    assert again is not None and again.key != a.key and again.credit == 4


@given(st.lists(st.tuples(st.sampled_from(["", "r", "s"]), st.integers(0, 4), st.integers(0, 4)), max_size=30))
def test_fences_never_go_back(seen: list[tuple[str, int, int]]) -> None:
    fences, highest = Fences(), {"r": (0, 0), "s": (0, 0)}
    for run, term, incarnation in seen:
        high_term, high_incarnation = highest.get(run, (0, 0))
        old = bool(run) and (0 < term < high_term or 0 < incarnation < high_incarnation)
        reason, higher = fences.check(run, term, incarnation)
        assert bool(reason) == old
        assert higher == (bool(run) and not old and term > high_term)
        if run and not old:
            highest[run] = (max(term, high_term), max(incarnation, high_incarnation))


STEP = st.sampled_from(["send", "send", "lose", "finish", "probe", "restart", "evict"])


@settings(max_examples=300, deadline=None)
@given(st.lists(STEP, max_size=60))
def test_client_and_server_agree_on_credit_after_every_probe(steps: list[str]) -> None:
    """Whatever was lost and however often the server forgot: a probe's answer makes both counts equal."""
    window, server = Window(), Sessions("0", window=4, maximum=1)

    def header(name: str) -> ReplyHeader:
        session = server.of(b"c")
        assert session is not None
        return ReplyHeader((1, 0), "done", name, session=session.key, credit=session.credit)

    def probe(name: str) -> None:
        window.note_probe(name, 0.0)
        answer, session = header(name), server.of(b"c")
        assert session is not None and window.hear(answer) is not Change.RESTARTED  # the probe itself sorts it out
        window.answered(answer, session.received)
        assert (window.sent, window.credit) == (session.received, session.credit)

    for number, step in enumerate(steps):
        session = server.of(b"c")
        assert session is not None
        match step:
            case "send" | "lose" if window.allows(0):
                window.note_request(counted=True)
                session.received += step == "send"
            case "finish" if session.finished < session.received:
                session.finished += 1
                if window.hear(header("x")) is Change.RESTARTED:
                    probe(f"r{number}")
            case "restart":
                server = Sessions(str(number + 1), window=4, maximum=1)
            case "evict" if session.finished == session.received:
                server.of(b"other")
            case "probe":
                probe(str(number))
        assert window.sent <= max(FIRST_CREDIT, window.credit or 0)
    probe("last")
    session = server.of(b"c")
    assert session is not None and session.received - session.finished <= 4 + FIRST_CREDIT
