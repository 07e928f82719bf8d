"""Tokenizers of another dataset: what one training is to read from several must be tokenized with
the same, and those that a dataset trains are its own.

    dataset.json    tokenizers: {like, taken: {modality: folder}, texts, ...}

The files are copied under the paths they have there, so that the set needs nothing of the other.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from infra.store import Store
from tasks.chain import Chain, remember
from tasks.train_tokenizers import INFO, TEXT

if TYPE_CHECKING:
    from tasks.train_tokenizers import TokenizerInfo


def shared(ours: Chain, theirs: Chain) -> dict[str, TokenizerInfo]:
    """The tokenizers of another dataset for which this one has labels, and that of text.

    Raises:
        ValueError: they are not all trained, or none is of use here.
    """
    if theirs.store.url == ours.store.url:
        raise ValueError(f"like={theirs.store.url!r} is this dataset itself")
    known = theirs.tokenizers
    found = {name: info for name, info in known.items() if name in {*ours.sources, TEXT}}
    if len(found) == 1 and not theirs.text_forms.keys() & ours.sources.keys():
        raise ValueError(f"{theirs.store.url} has tokenizers of {', '.join(known)}, and "
                         f"{ours.store.url} labels of {', '.join(ours.sources)}: none in common")
    return found


def take_tokenizers(store: Store, like: str) -> dict[str, TokenizerInfo]:
    """Copy another dataset's tokenizers and let this one tokenize with them from now on.

    Args:
        store: A dataset with labels.
        like: URL of the other one.

    Returns:
        Their records by modality and "text"; labels that the other one lacks are not tokenized.

    Raises:
        ValueError: see `shared`, or another tokenizer lies where one belongs.
    """
    theirs, ours = Chain(Store(like)), Chain(store)
    found = shared(ours, theirs)
    for info in found.values():
        _copy(theirs.store, store, info)
    choices = theirs.section("tokenizers")
    dense = [name for name in choices["modalities"] if name in found]
    own: dict[str, Any] = {
        name: {key: value for key, value in choices[name].items() if key in dense}
        for name in ("recipes", "changes") if name in choices
    }  # fmt: skip
    remember(store, "tokenizers", {
        **choices, **own, "modalities": dense, "shards": [], "like": like,
        "taken": {name: info.path for name, info in found.items()},
        "texts": sorted(theirs.text_forms),
    })  # fmt: skip
    return found


def _copy(theirs: Store, store: Store, info: TokenizerInfo) -> None:
    """All but pictures, which are of the other dataset; the record last."""
    paths = [path for path in theirs.list(f"{info.path}/") if not path.endswith((".jpg", INFO))]
    for path in paths:
        data = theirs.read(path)
        if not store.create(path, data) and store.read(path) != data:
            raise ValueError(f"{store.full(path)} is another one than {theirs.full(path)}")
    store.create_json(f"{info.path}/{INFO}", asdict(info))
