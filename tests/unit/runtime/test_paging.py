import pytest
from hypothesis import given
from hypothesis import strategies as st
from modelfleet.runtime.errors import InvalidInputError
from modelfleet.runtime.paging import Page, PageRequest

names = st.lists(st.text(min_size=1).filter(lambda text: text.isprintable()), unique=True).map(sorted)


def page_of(items: list[str], request: PageRequest, listing: str = "things") -> Page[str]:
    limit, after = request.limit, request.after(listing)
    rest = [item for item in items if after is None or item > after]
    return Page.cut(rest[: limit + 1], limit, listing, lambda item: item)


@given(names, st.integers(1, 7))
def test_pages_of_any_size_hold_every_entry_once_and_in_order(items: list[str], size: int) -> None:
    seen: list[str] = []
    token = ""
    while True:
        page = page_of(items, PageRequest(size, token))
        assert len(page.items) <= size
        seen += page.items
        if not (token := page.next_token):
            break
    assert seen == items


@given(st.text(min_size=1))
def test_text_that_is_no_token_is_refused(token: str) -> None:
    for read in (PageRequest(0, token).after, PageRequest(0, token).after_number):
        with pytest.raises(InvalidInputError) as caught:
            read("things")
        assert caught.value.field == "page_token"


def test_of_text_that_is_no_token_only_the_beginning_is_repeated() -> None:
    with pytest.raises(InvalidInputError, match=r"page_token '.{80}\.\.\.' is not one"):
        PageRequest(0, "A secret text. " * 1000).after("things")


@given(names.filter(bool))
def test_token_of_another_list_is_refused(items: list[str]) -> None:
    token = page_of([*items, max(items) + "x"], PageRequest(len(items)), "others").next_token
    with pytest.raises(InvalidInputError):
        PageRequest(0, token).after("things")


@pytest.mark.parametrize(("asked", "given"), [(0, 100), (1, 1), (1000, 1000), (1001, 1000), (2**31 - 1, 1000)])
def test_size_of_a_page_has_a_default_and_a_limit(asked: int, given: int) -> None:
    assert PageRequest(asked).limit == given
