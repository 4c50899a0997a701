"""What the benchmark of swaps makes of the streams that it saw."""

from __future__ import annotations

from benchmarks.swap import QUIET, SETTLED, Stream, Swap, phases, report

SWAPS = [Swap(100.0, 102.0, 103.0), Swap(120.0, 121.0, 124.5)]


def stream(sent: float, *pieces: float, failed: str | None = None) -> Stream:
    return Stream(sent, pieces, "a", failed)


def test_streams_are_of_the_quiet_before_a_swap_or_of_one() -> None:
    streams = [
        stream(100.0 - QUIET - 0.1, 96.0),  # too early to be compared with
        stream(97.0, 97.2, 97.3),
        stream(99.5, 99.7, 100.5),  # open when it was ordered
        stream(103.0 + SETTLED - 0.1, 104.5),
        stream(103.0 + SETTLED + 0.1, 104.9),  # over
        stream(119.0, 119.1),
    ]
    before, during = phases(streams, SWAPS)
    assert (before.streams, during.streams) == (2, 2)
    assert [round(seconds, 3) for seconds in before.first] == [0.2, 0.1]
    assert [round(seconds, 3) for seconds in during.between] == [0.8]


def test_a_stream_that_failed_is_counted_and_the_slowest_swap_is_told() -> None:
    streams = [stream(97.0 + i / 100, 97.2 + i / 100, 97.3 + i / 100) for i in range(100)]
    streams += [stream(102.0 + i / 100, 102.4 + i / 100, 102.5 + i / 100) for i in range(100)]
    rows, aims = report([*streams, stream(102.0, failed="status 503")], SWAPS)
    got = {aim.what: aim for aim in aims}
    assert (got["failed streams"].got, got["failed streams"].met) == (1, False)
    first = got["p99 to the first piece, during over before"]
    assert (round(first.got, 3), first.met) == (2.0, False)
    worst = got["seconds from the registry to the first token served, worst"]
    assert (worst.got, worst.met) == (3.5, True)
    assert (rows[0]["before p50 ms"], rows[0]["during p50 ms"]) == (200, 400)
