import subprocess
import sys
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from modelfleet.inference.assignment import WeightedVersion
from modelfleet.inference.routing import Choice, affinity_point

weights = st.lists(st.integers(1, 100), min_size=1, max_size=5)
two_weights = st.tuples(st.integers(1, 100), st.integers(1, 100))
points = st.floats(0, 1, exclude_max=True)


def choice(*weights: int) -> Choice:
    return Choice([WeightedVersion(number, weight) for number, weight in enumerate(weights, start=1)])


@given(weights, st.integers(1, 3))
def test_over_whole_rounds_each_version_has_exactly_its_share(weights: list[int], rounds: int) -> None:
    turns = choice(*weights)

    counts = Counter(turns.next() for _ in range(rounds * sum(weights)))

    assert [counts[number] for number in range(1, len(weights) + 1)] == [rounds * weight for weight in weights]


@given(two_weights, st.integers(1, 500))
def test_a_canary_s_count_is_never_off_by_a_whole_request(weights: tuple[int, int], requests: int) -> None:
    turns = choice(*weights)

    new = Counter(turns.next() for _ in range(requests))[1]

    assert abs(new - requests * weights[0] / sum(weights)) < 1


@given(weights, points)
def test_a_point_belongs_to_the_version_whose_part_of_the_line_it_is_on(weights: list[int], point: float) -> None:
    number = choice(*weights).at(point)

    start = sum(weights[: number - 1])
    assert start <= point * sum(weights) <= start + weights[number - 1]


@given(points, st.lists(st.integers(1, 99), min_size=2, unique=True).map(sorted))
def test_who_is_answered_by_a_canary_still_is_when_its_share_grows(point: float, percents: list[int]) -> None:
    by_canary = [choice(percent, 100 - percent).at(point) == 1 for percent in percents]

    assert all(after or not before for before, after in pairwise(by_canary))


@pytest.mark.parametrize("percent", [1, 10, 50, 99])
def test_keys_are_spread_evenly(percent: int) -> None:
    turns = choice(percent, 100 - percent)

    new = sum(turns.at(affinity_point("pii", "stable", f"user-{number}")) == 1 for number in range(20_000))

    assert abs(new / 20_000 - percent / 100) < 0.01


def test_keys_are_spread_anew_for_each_alias() -> None:
    keys = [f"user-{number}" for number in range(20_000)]

    both = sum(
        affinity_point("pii", "stable", key) < 0.1 and affinity_point("minilm", "stable", key) < 0.1 for key in keys
    )

    assert abs(both / 20_000 - 0.01) < 0.005


@given(st.text())
def test_every_key_has_a_point_within_the_line(key: str) -> None:
    assert 0 <= affinity_point("pii", "stable", key.encode("utf-8", "replace").decode()) < 1


def test_all_processes_agree_on_a_key_s_point() -> None:
    code = "from modelfleet.inference.routing import affinity_point; print(affinity_point('pii', 'stable', 'user-1'))"

    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout

    assert float(shown) == affinity_point("pii", "stable", "user-1") == 0.8342078465849488
