from hypothesis import given
from hypothesis import strategies as st
from modelfleet.bundle.bundle import Bundle, BundleFile
from modelfleet.bundle.manifest import Activation, Manifest, Pooling, Task
from modelfleet.inference.assignment import AssignedVersion, Assignment, Route, VersionKey, WeightedVersion

names = st.from_regex(r"[a-z][a-z0-9-]{0,8}", fullmatch=True)
numbers = st.integers(1, 2**62)
digests = st.from_regex(r"[0-9a-f]{64}", fullmatch=True)
words = st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=8)
manifests = st.builds(
    Manifest,
    task=st.just(Task.CLASSIFY),
    model=st.just("model.onnx"),
    tokenizer=st.just("tokenizer.json"),
    max_tokens=st.integers(1, 9000),
    vocabulary_size=st.none() | st.integers(1, 100_000),
    labels=st.lists(words, min_size=1, max_size=4).map(tuple),
    pooling=st.sampled_from(Pooling),
    activation=st.sampled_from(Activation),
    license=st.none() | words,
)


@st.composite
def bundles(draw: st.DrawFn) -> Bundle:
    paths = ["model.onnx", "tokenizer.json", *draw(st.lists(names, unique=True, max_size=3))]
    files = tuple(BundleFile(path, draw(digests), draw(st.integers(0, 2**40))) for path in paths)
    return Bundle(files, draw(manifests))


keys = st.builds(VersionKey, names, numbers)
targets = st.lists(st.builds(WeightedVersion, numbers, st.integers(1, 100)), min_size=1, max_size=2).map(tuple)
assignments = st.builds(
    Assignment,
    revision=st.integers(0, 2**62),
    versions=st.lists(st.builds(AssignedVersion, keys, bundles()), max_size=3).map(tuple),
    routes=st.lists(st.builds(Route, names, names, targets), max_size=3).map(tuple),
)


@given(assignments)
def test_an_assignment_is_read_as_it_was_written(assignment: Assignment) -> None:
    assert Assignment.from_json(assignment.to_json()) == assignment


def test_versions_are_written_as_name_and_number_and_ordered_by_them() -> None:
    assert str(VersionKey("m", 2)) == "m@2"
    assert sorted([VersionKey("b", 1), VersionKey("a", 10), VersionKey("a", 9)]) == [
        VersionKey("a", 9),
        VersionKey("a", 10),
        VersionKey("b", 1),
    ]
