import pytest
from hypothesis import given
from hypothesis import strategies as st
from modelfleet.bundle.reference import ModelReference, check_alias_name, check_model_name
from modelfleet.runtime.errors import InvalidInputError

names = st.from_regex(r"[a-z0-9][a-z0-9._-]{0,62}", fullmatch=True)
aliases = st.from_regex(r"[a-z][a-z0-9-]{0,62}", fullmatch=True)


@pytest.mark.parametrize(
    ("text", "reference"),
    [
        ("pii", ModelReference("pii", "stable", None)),
        ("pii@stable", ModelReference("pii", "stable", None)),
        ("pii@canary-2", ModelReference("pii", "canary-2", None)),
        ("pii@7", ModelReference("pii", None, 7)),
        ("all-MiniLM.l6_v2".lower(), ModelReference("all-minilm.l6_v2", "stable", None)),
    ],
)
def test_a_reference_names_an_alias_or_a_number(text: str, reference: ModelReference) -> None:
    assert ModelReference.parse(text) == reference


@given(model=names, selector=aliases | st.integers(1, 10**18 - 1).map(str))
def test_a_reference_reads_back_what_it_writes(model: str, selector: str) -> None:
    text = f"{model}@{selector}"

    assert str(ModelReference.parse(text)) == text


@pytest.mark.parametrize(
    "text",
    [
        *("", "@stable", "Pii", "../pii", "pii/x", "pii \n", "\uff50ii", "a" * 64),
        *("pii@", "pii@@1", "pii@Stable", "pii@1a", "pii@stable\n", "pii@" + "a" * 64),
        *("pii@0", "pii@01", "pii@-1", "pii@1.0", "pii@\uff11", "pii@" + "9" * 19),
    ],
)
def test_what_is_no_reference_is_refused_with_the_field(text: str) -> None:
    with pytest.raises(InvalidInputError, match="cannot name a") as raised:
        ModelReference.parse(text, field="model_name")
    assert raised.value.field == "model_name"


@pytest.mark.parametrize("text", ["A secret text. " * 1000, "pii@" + "A secret text. " * 1000])
def test_of_what_is_no_reference_only_the_beginning_is_repeated(text: str) -> None:
    with pytest.raises(InvalidInputError, match="cannot name a") as raised:
        ModelReference.parse(text)
    assert raised.value.message.count("secret") <= 6


def test_an_alias_that_is_a_number_would_name_a_version() -> None:
    with pytest.raises(InvalidInputError, match="a number names a model version instead"):
        check_alias_name("7")


def test_a_model_may_be_called_by_a_number() -> None:
    check_model_name("7")
