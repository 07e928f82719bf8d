"""What servers say in headers, also those that mean harm or know no better."""

import asyncio

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from yarl import URL

from infra.addresses import AddressPolicy
from infra.download import Downloader, DownloadPolicy, _retry_after, as_written, forbids


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
@example("2\x1d")
def test_any_header_is_read_without_an_error(text):
    forbids(text)
    assert (_retry_after(text) or 0.0) >= 0.0
    assert (_retry_after("Wed, 21 Oct 2015 07:28:00 GMT", text) or 0.0) >= 0.0


@pytest.mark.parametrize("url", ["http://[::%]@/", "//[::%]@/", "http://[::1", "http://a.b:99999/"])
def test_what_is_no_url_costs_its_row_and_nothing_else(url):
    async def fates():
        downloader = Downloader(DownloadPolicy(attempts=1))
        try:
            return [found.reason async for found in downloader.each([url, "ftp://a.org/b.jpg"])]
        finally:
            await downloader.close()

    assert sorted(asyncio.run(fates())) == ["bad_url", "blocked_address"]


@given(st.text("htp:/[]@%.?#a1\0 ", max_size=30))
def test_any_text_is_a_url_or_a_value_error(text):
    try:
        as_written("http://" + text)
    except ValueError:
        return


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


@pytest.mark.parametrize("zone", ["GMT", "-0000"])
def test_a_date_to_retry_after_is_one_of_the_servers_clock_however_wrong_that_is(zone):
    until, date = f"Wed, 21 Oct 2015 07:28:30 {zone}", f"Wed, 21 Oct 2015 07:28:00 {zone}"
    assert _retry_after(until, date) == 30.0
    assert _retry_after(until, "yesterday") == 0.0


SIGNED = "/a%2Fb%28c%29.jpg?u=https%3A%2F%2Fx%2Fy&sig=AbC%2fdE%3d&%7E=~"


@pytest.mark.parametrize(
    ("target", "asked"),
    [
        (SIGNED, [SIGNED]),
        ("/to?where=1", ["/to?where=1", SIGNED]),
        ("/\N{LATIN SMALL LETTER E WITH ACUTE} b.jpg?x=100%#top", ["/%C3%A9%20b.jpg?x=100%25"]),
        ("/a/../b.jpg?x=%2F", ["/b.jpg?x=/"]),
        ("?x=%2F", ["/?x=%2F"]),
    ],
)
def test_signed_urls_go_out_byte_for_byte_and_others_as_they_must_be(target, asked):
    seen = []

    async def answer(reader, writer):
        request = (await reader.readuntil(b"\r\n\r\n")).decode()
        seen.append(request.split(" ")[1])
        moved = b"HTTP/1.1 302 Found\r\nLocation: " + SIGNED.encode()
        head = moved if seen[-1].startswith("/to") else b"HTTP/1.1 200 OK"
        writer.write(head + b"\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        await writer.drain()
        writer.close()

    async def run():
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        host = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        policy = DownloadPolicy(addresses=AddressPolicy(frozenset({host})), attempts=1)
        downloader = Downloader(policy)
        try:
            return [found async for found in downloader.each([f"http://{host}{target}"])]
        finally:
            await downloader.close()
            server.close()

    (found,) = asyncio.run(run())
    assert seen == asked, found


@given(st.text(alphabet="ab/.:?#%2F[]@\\é \t", max_size=24))
@example("//evil.example/x")
@example("@evil.example/")
def test_a_url_leads_to_the_same_host_as_its_plain_reading(rest):
    try:
        plain = URL(f"http://host.example{rest}")
    except ValueError:
        return
    found = as_written(f"http://host.example{rest}")
    assert (found.scheme, found.raw_authority) == (plain.scheme, plain.raw_authority)
    assert found.path == plain.path
    assert found.query == plain.query
