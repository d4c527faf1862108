from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st
from modelfleet.tokenizer.cutting import (
    Layout,
    Truncation,
    covered,
    covered_tokens,
    kept_lengths,
    truncated,
    window_parts,
)

lengths = st.integers(0, 500)


@given(first=lengths, second=lengths, data=st.data())
def test_truncation_fills_the_room_and_cuts_the_longer_half_first(first: int, second: int, data: st.DataObject) -> None:
    room = data.draw(st.integers(0, max(first + second - 1, 0)))

    kept = kept_lengths(first, second, room)

    assert sum(kept) == room or first + second == 0
    cut = (first - kept[0], second - kept[1])
    assert min(cut) >= 0
    if min(cut) > 0:  # both were cut, so they were made alike
        assert abs(kept[0] - kept[1]) <= 1
    elif sum(cut):
        assert cut.index(max(cut)) == (0 if first >= second else 1)  # the first of two alike, as the library


@given(length=st.integers(1, 500), data=st.data())
def test_windows_cover_all_in_order_and_neighbours_share_the_stride(length: int, data: st.DataObject) -> None:
    room = data.draw(st.integers(1, 60))
    stride = data.draw(st.integers(0, room - 1))

    parts = window_parts(range(10, 10 + length), room, stride)

    assert parts[0].start == 10
    assert parts[-1].stop == 10 + length
    assert all(len(part) == room for part in parts[:-1])
    assert 0 < len(parts[-1]) <= room
    for before, after in pairwise(parts):
        assert before.stop - after.start == stride
        assert after.stop > before.stop


@given(first=st.integers(1, 60), second=lengths, special=st.integers(0, 3), data=st.data())
def test_the_tokens_of_windows_are_known_before_they_are_made(
    first: int, second: int, special: int, data: st.DataObject
) -> None:
    layout = Layout(
        special + first + second, range(special, special + first), range(special + first, special + first + second)
    )
    repeated = special + (first if second else 0)
    max_tokens = data.draw(st.integers(repeated + 1, repeated + 60))
    stride = data.draw(st.integers(0, max_tokens - repeated - 1))

    windows = covered(layout, max_tokens, stride)

    held = sum(part.stop - part.start for window in windows for part in window)
    assert covered_tokens(layout, max_tokens, stride) == held


def test_truncation_keeps_special_tokens_wherever_the_template_puts_them() -> None:
    layout = Layout(10, first=range(6, 9), second=range(1, 5))  # . BBBB . AAA .

    assert truncated(layout, 6, Truncation.RIGHT) == (slice(0, 3), slice(5, 7), slice(9, 10))
    assert truncated(layout, 6, Truncation.LEFT) == (slice(0, 1), slice(3, 6), slice(8, 10))


def test_a_single_text_has_no_second_half_to_cut() -> None:
    layout = Layout(6, first=range(1, 5), second=range(6, 6))

    assert truncated(layout, 4, Truncation.RIGHT) == (slice(0, 3), slice(5, 6), slice(6, 6))
