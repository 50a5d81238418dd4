"""The governor of a pool: fewer threads while others take the cores away, all of them again afterwards."""

from __future__ import annotations

from itertools import pairwise

from edgewise.native import _core


def run(governor: object, seconds: float, rate: float, step: float = 0.01) -> list[int]:
    """Limits after each run of `step` seconds, losing the core `rate` times a second."""
    limits = []
    for _ in range(round(seconds / step)):
        governor.observe(step, round(rate * step))
        limits.append(governor.limit)
    return limits


def test_a_quiet_machine_keeps_all_threads() -> None:
    assert set(run(_core.Governor(4), 5.0, 0.0)) == {4}


def test_a_single_loss_is_not_contention() -> None:
    governor = _core.Governor(4)
    governor.observe(0.05, 1)
    assert governor.limit == 4


def test_contention_rests_half_of_the_threads_then_tries_all() -> None:
    limits = run(_core.Governor(4), 20.0, 500.0)
    assert set(limits) == {2, 4}
    assert limits.count(2) > 0.9 * len(limits)


def test_rests_get_longer_and_end_when_the_machine_is_quiet() -> None:
    governor = _core.Governor(2)
    limits = run(governor, 20.0, 500.0)
    tries = [i for i in range(1, len(limits)) if limits[i - 1] == 1 and limits[i] == 2]
    gaps = [later - earlier for earlier, later in pairwise(tries)]
    assert gaps[0] < gaps[1]
    assert gaps[-1] == gaps[-2]
    assert run(governor, 10.0, 0.0)[-1] == 2


def test_a_rest_goes_by_while_nothing_runs() -> None:
    governor = _core.Governor(2)
    run(governor, 0.2, 500.0)
    assert governor.limit == 1
    governor.pass_time(5.0)
    assert governor.limit == 2


def test_one_thread_is_left_alone() -> None:
    assert set(run(_core.Governor(1), 1.0, 1e5)) == {1}
