"""What goes wrong between us and an object store, as an OSError in words."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

# 409 is "another conditional write is under way": the answer is to ask again.
_TRANSIENT = frozenset({409, 429, 500, 502, 503, 504})


@contextmanager
def in_words(root: str) -> Iterator[None]:
    """Turns errors of the clients, which are of many kinds, into OSErrors that name the place.

    Args:
        root: Bucket and prefix.
    """
    from aiohttp import ClientError
    from botocore.exceptions import BotoCoreError
    from fsspec.exceptions import FSTimeoutError

    try:
        yield
    except (BotoCoreError, ClientError, FSTimeoutError) as error:
        what = f"s3://{root} cannot be reached: {type(error).__name__}"
        raise ConnectionError(f"{what}: {error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        # As where a proxy answers with a page of its own: its listing would pass for an empty one.
        raise ConnectionError(
            f"s3://{root}: what is there answers otherwise than S3 "
            f"({type(error).__name__}: {error!s:.200}); check AWS_ENDPOINT_URL"
        ) from error
    except PermissionError as error:
        raise PermissionError(
            f"s3://{root} refuses: {error}; check AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, and what they may do there"
        ) from error


def is_transient(error: OSError) -> bool:
    """Whether to ask again: a busy service, or a connection that was refused or reset. Time-outs
    and cut answers are not among them: s3fs has asked again for those, and waited each time."""
    from botocore.exceptions import EndpointConnectionError

    refused = isinstance(error.__cause__, EndpointConnectionError)
    return refused or http_status(error) in _TRANSIENT


def http_status(error: OSError) -> int | None:
    """Status of the answer that an error is about."""
    response = getattr(error.__cause__, "response", None) or {}
    return response.get("ResponseMetadata", {}).get("HTTPStatusCode")
