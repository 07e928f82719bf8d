"""`fourm withdraw`: samples that must go, and what was done about them."""

from __future__ import annotations

from collections.abc import Iterator

from infra.store import Store
from pipelines.params import WithdrawParams

_SHOWN = 5
_ELSEWHERE = (
    "not reached: exports, copies and backups, caches of S3 on workers ($FOURM_CACHE), "
    "pictures in Prefect's artifacts, in reports/ and tokenizers/*/sheet.jpg, and what models "
    "have learned"
)


def run(values: WithdrawParams) -> Iterator[str]:
    """Does it, or says what would be done, in lines. Raises ValueError without a dataset."""
    import fsspec

    from tasks.withdraw import withdraw

    store = Store(values.root)
    if not store.exists("plan/plan.json"):
        raise ValueError(f"there is no dataset at {values.root}")
    with fsspec.open(values.names, "rt", encoding="utf-8-sig") as lines:
        wanted = {line.partition("\t")[0].strip() for line in lines} - {""}
    if not wanted:
        raise ValueError(f"{values.names} names nothing")
    if values.apply:
        store.check_writable()
    done = withdraw(store, wanted, apply=values.apply)
    yield f"{len(done.keys):,} samples{_some(done.keys)}, in {done.commits:,} commits"
    if done.unknown:
        yield f"{len(done.unknown):,} names of no sample{_some(done.unknown)}"
    if done.copies:
        yield (
            f"{len(done.copies):,} other samples hold the same pictures and stay"
            f"{_some(done.copies)}; name their keys to take them out, too"
        )
    if not values.apply:
        yield "nothing was changed; --apply does it, while no other run is at work"
        return
    yield f"{done.removed:,} objects were removed; amended: {_list(done.manifests)}"
    yield _ELSEWHERE


def _some(names: list[str]) -> str:
    more = ", ..." if len(names) > _SHOWN else ""
    return f" ({', '.join(names[:_SHOWN])}{more})" if names else ""


def _list(names: list[str]) -> str:
    return ", ".join(names) or "nothing"
