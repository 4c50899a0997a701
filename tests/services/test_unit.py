"""How far behind a handler is: records, not offsets."""

from __future__ import annotations

from everloop.log import Record

from services.unit import Behind


class Gaps:
    """A log of one partition that ends with offsets of no record, as those of transactions do."""

    def __init__(self, offsets: list[int], end: int) -> None:
        self.offsets, self.end, self.reads = offsets, end, 0

    def end_offsets(self, topic: str) -> list[int]:
        return [self.end]

    def read(self, topic: str, partition: int, offset: int = 0, max_records: int = 500) -> list[Record]:
        self.reads += 1
        found = [at for at in self.offsets if at >= offset]
        return [Record(topic, partition, at, "k", b"", {}, 0.0) for at in found[:max_records]]


def test_offsets_of_no_record_are_not_waited_for() -> None:
    log = Gaps([0, 1, 4], end=6)
    behind = Behind(log)
    at = ("episodes", 0)
    assert behind({at: 0}) == {at: 6}
    assert behind({at: 2}) == {at: 2}, "what lies between is of no record"
    assert behind({at: 5}) == {at: 0}
    reads = log.reads
    assert behind({at: 5}) == {at: 0}
    assert log.reads == reads, "it is known to be empty"
    log.offsets, log.end = [6], 8
    assert behind({at: 5}) == {at: 2}
