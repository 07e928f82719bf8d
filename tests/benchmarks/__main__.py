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

from tests.benchmarks.measure import Options

BENCHMARKS = {
    "train_step": ("training", "4M training steps: samples/s, tokens/s, peak memory"),
    "loader": ("training", "masked batches from token shards: samples/s on one core"),
    "label": ("networks", "labelling stage against its bare network: images/s"),
    "tokenize": ("networks", "tokenizing stage against its bare encoder: crops/s"),
    "scale": ("scale", "the engine beside any network: cost of a sample at 1k, 10k, 50k samples"),
    "generate": ("generation", "captions and depth maps from pixels: samples/s"),
}


def measure(name: str, options: Options) -> list[dict[str, Any]]:
    """Runs one benchmark in this process and returns its records."""
    import torch

    torch.set_num_threads(options.threads)
    module = importlib.import_module(f"tests.benchmarks.{BENCHMARKS[name][0]}")
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
    parser.add_argument("--dtype", choices=["fp32", "bf16"], help="default: the faster one here")
    parser.add_argument("--threads", type=int, default=1, help="of torch (%(default)s)")
    parser.add_argument("--seconds", type=float, default=5.0,
                        help="least time measured, training aside (%(default)s)")
    return parser


def _fast_dtype() -> str:
    from infra.machine import fast_bf16

    return "bf16" if fast_bf16() else "fp32"


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the command line."""
    args = _arguments().parse_args(argv)
    if args.list:
        for name, (_, what) in BENCHMARKS.items():
            print(f"{name:12} {what}")
        return
    dtype = args.dtype or _fast_dtype()
    if args.name == "all":
        same = ["--dtype", dtype, "--threads", str(args.threads), "--seconds", str(args.seconds)]
        records = [record for name in BENCHMARKS for record in measure_apart(name, same)]
    else:
        options = Options(dtype=dtype, threads=args.threads, seconds=args.seconds)
        records = measure(args.name, options)
        for record in records:
            bare = f"  bare {record['bare']}  ratio {record['ratio']}" if record["bare"] else ""
            also = "  ".join(f"{key} {value}" for key, value in record["also"].items())
            print(f"{record['name']:17} {record['ours']} {record['unit']}{bare}  {also}")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()
