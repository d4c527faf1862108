import pytest
from hypothesis import given
from hypothesis import strategies as st
from modelfleet.manager.canary import Canary, p99_s, since, total
from modelfleet.manager.workers import Traffic

counts = st.lists(st.integers(0, 1000), min_size=18, max_size=18).map(tuple)


@st.composite
def traffics(draw: st.DrawFn) -> Traffic:
    latencies = draw(counts)
    requests = sum(latencies)
    return Traffic(requests, draw(st.integers(0, requests)), latencies)


def bucket(index: int, requests: int, failures: int = 0) -> Traffic:
    """Requests that took up to 2^index ms and more than half of that."""
    return Traffic(requests, failures, tuple(requests * (position == index) for position in range(18)))


@given(traffics(), traffics())
def test_what_was_added_and_what_was_before_are_what_is_now(before: Traffic, added: Traffic) -> None:
    assert since(total([before, added]), before) == added


def test_counts_that_began_anew_are_counted_whole() -> None:
    assert since(bucket(3, 5), bucket(3, 100)) == bucket(3, 5)


@given(traffics())
def test_the_99th_percentile_lies_in_the_bucket_that_has_it(traffic: Traffic) -> None:
    found = p99_s(traffic)

    if not traffic.request_count:
        assert found is None
        return
    assert found is not None
    at_most = sum(count for index, count in enumerate(traffic.latency_counts) if 2.0**index / 1000 <= found)
    below = sum(count for index, count in enumerate(traffic.latency_counts) if 2.0**index / 1000 < found)
    later = next((count for count in traffic.latency_counts[_index(found) :] if count), 0)
    assert at_most + later >= 0.99 * traffic.request_count
    assert below <= 0.99 * traffic.request_count + 1e-6


def _index(seconds: float) -> int:
    return next(index for index in range(18) if seconds * 1000 <= 2.0**index)


@pytest.mark.parametrize(
    ("canary", "old", "new", "verdict"),
    [
        (Canary((10,)), bucket(3, 1000), bucket(9, 1000, 1000), ""),
        (Canary((10,), max_error_rate=0.01), bucket(3, 0), bucket(3, 100, 1), ""),
        (Canary((10,), max_error_rate=0.01), bucket(3, 0), bucket(3, 99, 99), ""),
        (Canary((10,), max_error_rate=0), bucket(3, 0), bucket(3, 100, 1), "failed 1 of 100 requests, 1.00%"),
        (Canary((10,), max_p99_s=0.008), bucket(3, 0), bucket(3, 100), ""),
        (Canary((10,), max_p99_s=0.007), bucket(3, 0), bucket(3, 100), "p99 is 8.0 ms; max_p99 is 7.0 ms"),
        (Canary((10,), max_p99_ratio=2), bucket(3, 100), bucket(4, 100), ""),
        (Canary((10,), max_p99_ratio=1.9), bucket(3, 100), bucket(4, 100), "2.00 times the old version's 8.0 ms"),
        (Canary((10,), max_p99_ratio=1.9), bucket(3, 99), bucket(4, 100), ""),
        (Canary((10,), max_p99_ratio=1.9, min_requests=1), bucket(3, 1), bucket(9, 1), "p99 is 509.4 ms, 64.00 times"),
    ],
)
def test_a_canary_is_judged_by_its_limits_once_there_is_enough(
    canary: Canary, old: Traffic, new: Traffic, verdict: str
) -> None:
    found = canary.verdict(old, new)

    assert verdict in found
    assert bool(found) == bool(verdict)


def test_a_canary_without_limits_needs_no_requests() -> None:
    assert Canary((10,)).suffices(Traffic())
    assert not Canary((10,), max_error_rate=1).suffices(bucket(3, 99))
    assert Canary((10,), max_error_rate=1).suffices(bucket(3, 100))
