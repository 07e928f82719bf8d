"""Measures the fast paths: python -m tests.benchmarks NAME --json OUT"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from infra.machine import Products, cores
from tests.benchmarks.measure import Options, under_way
from tests.benchmarks.peer import check_peer

PEER = "img2dataset"
BENCHMARKS = {
    "fetch": ("fetching", "ingestion from a web with failures: images/s, beside img2dataset's"),
    "train_step": ("training", "4M training steps: samples/s, tokens/s, peak memory"),
    "loader": ("loading", "masked batches from token shards: samples/s on one core"),
    "label": ("networks", "labelling stage against its bare network: images/s"),
    "tokenize": ("networks", "tokenizing stage against its bare encoder: crops/s"),
    "scale": ("scale", "the engine beside any network: cost of a sample at 1k, 10k, 50k samples"),
    "tokenizer_quality": ("reconstruction", "our tokenizer beside the released recipe: error, "
                          "code usage; 4 minutes at most"),
    "generate": ("generation", "captions, depth and all else from pixels: samples/s"),
    "encode": ("generation", "embeddings of pictures and of several modalities: samples/s"),
}

PER_CORE = ("label", "tokenize")


def measure(name: str, options: Options) -> list[dict[str, Any]]:
    """Runs one benchmark in this process and returns its records."""
    import torch

    torch.set_num_threads(options.threads)
    module = importlib.import_module(f"tests.benchmarks.{BENCHMARKS[name][0]}")
    with under_way(name):
        return [record.to_dict() for record in getattr(module, name)(options)]


def measure_apart(name: str, arguments: Sequence[str]) -> list[dict[str, Any]]:
    """Runs one benchmark in a process of its own, so that peaks of memory do not mix."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "records.json"
        command = [sys.executable, "-m", "tests.benchmarks", name, "--json", str(out), *arguments]
        subprocess.run(command, check=True)
        return json.loads(out.read_text())


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("name", nargs="?", default="all", choices=[*BENCHMARKS, "all"])
    parser.add_argument("--list", action="store_true", help="name the benchmarks")
    parser.add_argument("--json", type=Path, metavar="OUT", help="file for the list of records")
    parser.add_argument("--dtype", choices=["fp32", "tf32", "bf16"],
                        help="default: fp32 or bf16, the faster one here; tf32 for train_step")
    parser.add_argument("--threads", type=int,
                        help=f"of torch; label and tokenize need one core more (1 there, else "
                             f"{cores()})")
    parser.add_argument("--seconds", type=float, default=5.0,
                        help="least time measured for each figure (%(default)s)")
    parser.add_argument("--peer", default="", metavar="WHAT",
                        help="what to measure beside ours, in turn and on the same data: a "
                             "checkout of the released code (git clone "
                             "https://github.com/apple/ml-4m); with fetch: img2dataset")
    parser.add_argument("--peer-python", default="", metavar="PATH",
                        help="interpreter that has img2dataset installed")
    parser.add_argument("--rows", type=int, default=40_000,
                        help="with fetch: length of the list (%(default)s)")
    parser.add_argument("--size", action="append", choices=["tiny", "base"],
                        help="network of 4M-7; may be repeated (tiny)")
    parser.add_argument("--only", default="", metavar="TEXT",
                        help="only cases whose name holds this, such as label.200")
    parser.add_argument("--compile", action="store_true",
                        help="train with compiled blocks (train_step); slower on CPUs so far")
    return parser


def _fast_dtype() -> Products:
    from infra.machine import fast_bf16

    return "bf16" if fast_bf16() else "fp32"


def _options(args: argparse.Namespace) -> Options:
    if args.dtype == "tf32" and args.name != "train_step":
        raise SystemExit(f"--dtype tf32: {args.name} knows fp32 and bf16; train_step trains in it")
    threads = args.threads or (1 if args.name in PER_CORE else cores())
    return Options(dtype=args.dtype or _fast_dtype(), threads=threads, seconds=args.seconds,
                   peer=args.peer, peer_python=args.peer_python, rows=args.rows,
                   sizes=tuple(args.size or ["tiny"]), only=args.only, compile=args.compile)


def _suits(name: str, peer: str) -> bool:
    return not peer or (peer == PEER) == (name == "fetch")


def _check_peer(name: str, peer: str) -> None:
    """Raises SystemExit for what cannot be measured beside ours."""
    if name != "all" and not _suits(name, peer):
        wanted = PEER if name == "fetch" else "a checkout of the released code"
        raise SystemExit(f"--peer {peer}: {name} is measured beside {wanted}")
    if peer and peer != PEER:
        try:
            check_peer(Path(peer))
        except ValueError as error:
            raise SystemExit(f"--peer: {error}") from None


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the command line."""
    argv = sys.argv[1:] if argv is None else argv
    args = _arguments().parse_args(argv)
    if args.list:
        for name, (_, what) in BENCHMARKS.items():
            print(f"{name:18} {what}")
        return
    _check_peer(args.name, args.peer)
    if args.name == "all":
        given = [argument for argument in argv if argument != "all"]
        records = [record for name in BENCHMARKS for record in measure_apart(
            name, given if _suits(name, args.peer) else [*given, "--peer", ""])]
    else:
        records = measure(args.name, _options(args))
        for record in records:
            print(_line(record))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(records, indent=1) + "\n")


def _line(record: dict[str, Any]) -> str:
    sides = "".join(f"  {side} {record[side]}" for side in ("bare", "peer", "ratio")
                    if record[side] is not None)
    also = "  ".join(f"{key} {value}" for key, value in record["also"].items())
    return f"{record['name']:19} {record['ours']} {record['unit']}{sides}  {also}"


if __name__ == "__main__":
    main()
