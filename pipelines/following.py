"""The command that a dataset needs after another."""

from __future__ import annotations

import shlex

from pipelines.forms import Where

_NEXT = {
    "ingest": "label",
    "retry": "label",
    "label": "train-tokenizers",
    "train_tokenizers": "tokenize",
    "tokenize": "publish",
    "publish": "train",
    "train": "evaluate",
}
_HANDED_ON = {
    "publish": {"name": "manifest"},
    "train": {"run": "run", "manifest": "manifest"},
}
"""Fields whose value the next command has to be told, and what it calls them."""


def following(flow: str, values: Where) -> str:
    """The next command; empty after the last.

    Args:
        flow: that has ended, such as "train_tokenizers".
        values: its parameters. What bears another name than the next command would look for is
            named in it.
    """
    if flow not in _NEXT:
        return ""
    fields = type(values).model_fields
    named = "".join(
        f" --{option} {getattr(values, field).partition('@')[0]}"
        for field, option in _HANDED_ON.get(flow, {}).items()
        if getattr(values, field) != fields[field].default
    )
    return f"fourm {_NEXT[flow]} --root {shlex.quote(values.root)}{named}"
