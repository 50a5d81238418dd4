"""What a thread fetches ahead: exactly what it reads next, in order, across stretches, phases and passes."""

from __future__ import annotations

import numpy as np
import pytest

from edgewise.native import _core

LINE, DISTANCE, FARTHEST = 64, 6144, 128 << 10
Stretches = list[list[tuple[int, int]]]  # of each phase: (address, bytes), in pieces that are read at once


def planned(phases: Stretches) -> object:
    reads = _core.ReadAhead()
    reads.reset(len(phases))
    for phase, pieces in enumerate(phases):
        for address, nbytes in pieces:
            reads.add(phase, address, nbytes)
    return reads


def fetched_by_a_pass(reads: object, phases: Stretches) -> list[int]:
    """Lines that kernels fetch while a thread reads everything in order."""
    lines = []
    reads.begin()
    for phase, pieces in enumerate(phases):
        reads.seek(phase)
        for address, nbytes in pieces:
            before, turn, after = reads.over(address, nbytes)
            lines += [p + (before if p < turn else after) for p in range(address, address + nbytes, LINE)]
    return lines


def lines_of(phases: Stretches) -> list[int]:
    return [p for pieces in phases for address, nbytes in pieces for p in range(address, address + nbytes, LINE)]


def pieces(count: int, nbytes: int, address: int) -> list[tuple[int, int]]:
    return [(address + i * nbytes, nbytes) for i in range(count)]


def test_every_line_is_fetched_once_a_distance_before_it_is_read() -> None:
    phases = [pieces(20, 5760, 1 << 20), pieces(7, 5760, 1 << 24), pieces(9, 5760, 1 << 28)]
    expected, ahead = lines_of(phases), DISTANCE // LINE
    reads = planned(phases)
    first, second = fetched_by_a_pass(reads, phases), fetched_by_a_pass(reads, phases)
    assert first == expected[ahead:] + expected[:ahead]
    assert second == first


def test_phases_without_anything_to_read_are_passed_over() -> None:
    phases = [pieces(4, 4096, 1 << 20), [], [], pieces(4, 4096, 1 << 24), []]
    lines, ahead = lines_of(phases), DISTANCE // LINE
    assert fetched_by_a_pass(planned(phases), phases) == lines[ahead:] + lines[:ahead]


def test_what_waiting_threads_fetched_is_not_fetched_again() -> None:
    phases = [pieces(10, 8192, 1 << 20), pieces(10, 8192, 1 << 24)]
    reads = planned(phases)
    reads.begin()
    reads.seek(0)
    reads.fetch(40_000)
    assert reads.lead == 40_000
    before, turn, _ = reads.over(phases[0][0][0], 8192)
    assert before == 40_000
    assert turn > phases[0][0][0]
    assert reads.lead == 40_000


def test_fetching_stops_at_the_farthest_point() -> None:
    phases = [pieces(1, 1 << 22, 1 << 24)]
    reads = planned(phases)
    reads.begin()
    reads.seek(0)
    for _ in range(1000):
        reads.fetch(512)
    assert reads.lead == FARTHEST
    reads.fetch(512)
    assert reads.lead == FARTHEST


def test_a_short_model_is_no_endless_loop() -> None:
    reads = planned([[(1 << 20, 64)], []])
    reads.begin()
    reads.seek(0)
    reads.fetch(1 << 20)
    assert reads.over(1 << 20, 64) is not None
    empty = planned([[], []])
    empty.begin()
    empty.seek(1)
    empty.fetch(512)
    assert empty.over(1 << 20, 64) == (0, 0, 0)


def test_changed_phases_count_from_the_next_pass_on() -> None:
    first = [pieces(4, 4096, 1 << 20), pieces(2, 4096, 1 << 24)]
    reads = planned(first)
    fetched_by_a_pass(reads, first)
    grown = [first[0], pieces(3, 4096, 1 << 24)]
    reads.clear(1)
    for address, nbytes in grown[1]:
        reads.add(1, address, nbytes)
    assert set(lines_of(grown)) <= set(fetched_by_a_pass(reads, grown)) | set(lines_of(first)[:DISTANCE // LINE])


@pytest.mark.parametrize("seed", range(5))
def test_random_shapes_never_fetch_what_is_not_read_but_for_the_ends_of_stretches(seed: int) -> None:
    rng = np.random.default_rng(seed)
    phases = [pieces(int(rng.integers(0, 12)), int(rng.integers(1, 80)) * LINE, (phase + 1) << 26)
              for phase in range(30)]
    expected, reads = set(lines_of(phases)), planned(phases)
    fetched = fetched_by_a_pass(reads, phases) + fetched_by_a_pass(reads, phases)
    missing = expected - set(fetched)
    # A window over more than two stretches loses the tail of what lies between: little, and never a wrong answer.
    assert len(missing) < 0.1 * len(expected)
    assert len([p for p in fetched if p not in expected]) < 0.1 * len(fetched)


@pytest.mark.parametrize(("threads", "items", "least", "most"), [
    (1, 7, 2, 2), (2, 0, 1, 1), (2, 1, 4, 8), (2, 101, 1, 1), (2, 101, 2, 16), (3, 64, 5, 5), (4, 3, 2, 8)])
def test_shares_cover_every_item_once_in_every_phase(threads: int, items: int, least: int, most: int) -> None:
    rounds = 20
    taken = _core.pool_shares(threads, items, least, most, rounds)
    counts = np.zeros(items, int)
    for thread, start, end, own in taken:
        assert start < end <= items
        assert end - start <= (most if own else least)
        low, high = items * thread // threads, items * (thread + 1) // threads
        assert own == (low <= start and end <= high)
        counts[start:end] += 1
    assert (counts == rounds).all()
