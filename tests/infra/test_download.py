"""What servers say in headers, also those that mean harm or know no better."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.download import _retry_after, forbids


@pytest.mark.parametrize(
    "header",
    [
        "noai",
        "all, NoImageAI",
        "noindex;nofollow",
        "*: noindex",
        "fourm: noai",
        "googlebot: nofollow, fourm: noai",
        "noai, unavailable_after: 25 Jun 2030 15:00:00 PST",
        "unavailable_after: Friday, 25-Jun-30 15:00:00 PST, noai",
        "max-snippet:-1, max-image-preview: large, noimageindex",
        "max-video-preview: 3 noindex",
    ],
)
def test_a_header_that_forbids_us_binds_wherever_the_word_stands(header):
    assert forbids(header)


@pytest.mark.parametrize(
    "header",
    [
        "",
        "all",
        "nofollow, noarchive",
        "googlebot: noindex",
        "googlebot: nofollow, otherbot: noindex, noai",
        "max-image-preview: none",
        "unavailable_after: 25 Jun 2030 15:00:00 PST",
    ],
)
def test_a_header_for_others_or_without_a_ban_does_not_bind(header):
    assert not forbids(header)


@given(st.text(max_size=60))
def test_any_header_is_read_without_an_error(text):
    forbids(text)
    assert (_retry_after(text) or 0.0) >= 0.0


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (None, None),
        ("120", 120.0),
        (" 5 ", 5.0),
        ("9" * 400, float("inf")),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0.0),
        ("Wed, 21 Oct 99999999999 07:28:00 GMT", None),
        ("-3", None),
        ("\N{SUPERSCRIPT TWO}", None),
        ("soon", None),
    ],
)
def test_retry_after_is_seconds_or_a_date_and_else_nothing(value, seconds):
    assert _retry_after(value) == seconds
