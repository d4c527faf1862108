import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from modelfleet.client.packing import pack_sequences, pack_vectors, unpack_ints, unpack_sequences, unpack_vectors

INT32 = st.integers(-(2**31), 2**31 - 1)


@given(arrays.arrays(np.float32, st.tuples(st.integers(0, 5), st.integers(1, 8)), elements={"allow_nan": False}))
def test_vectors_come_back_as_they_were(vectors: npt.NDArray[np.float32]) -> None:
    unpacked = unpack_vectors(pack_vectors(vectors), vectors.shape[1])

    assert unpacked.dtype == np.float32
    assert unpacked.shape == vectors.shape
    assert np.array_equal(unpacked, vectors)


@given(st.lists(st.lists(INT32, max_size=6), max_size=5))
def test_sequences_come_back_as_they_were(sequences: list[list[int]]) -> None:
    ids, lengths = pack_sequences(sequences)

    unpacked = unpack_sequences(ids, unpack_ints(lengths))

    assert [sequence.tolist() for sequence in unpacked] == sequences


def test_bytes_are_little_endian_and_row_major() -> None:
    assert pack_sequences([[1, 258]]) == (b"\x01\0\0\0\x02\x01\0\0", b"\x02\0\0\0")
    assert pack_vectors(np.array([[1, 2], [3, 4]], ">f8", order="F")) == np.array([1, 2, 3, 4], "<f4").tobytes()


def test_offsets_come_in_pairs() -> None:
    packed, lengths = pack_sequences([[0, 1, 1, 4], [2, 3]])

    first, second = unpack_sequences(packed, unpack_ints(lengths) // 2, width=2)

    assert first.tolist() == [[0, 1], [1, 4]]
    assert second.tolist() == [[2, 3]]


def test_what_is_unpacked_can_be_written_to() -> None:
    vectors = unpack_vectors(pack_vectors([[1.0, 2.0]]), 2)

    vectors /= 2

    assert vectors.tolist() == [[0.5, 1.0]]


@pytest.mark.parametrize("sequence", [[1.5], ["a"], [[1, 2]], 7, [2**31], [-(2**31) - 1]])
def test_what_is_no_list_of_32_bit_integers_is_refused(sequence: object) -> None:
    with pytest.raises(ValueError, match=r"token ids are .*integers"):
        pack_sequences([sequence])
