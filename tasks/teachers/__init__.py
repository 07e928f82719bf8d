"""The networks that label scenes: how they are trained, on what, and what they reach.

Run `python -m tasks.teachers NAME --minutes N` to train one again into the shipped weights.
"""

from __future__ import annotations

import argparse
import importlib
import logging
from pathlib import Path

RECIPES = {
    "depth": "tasks.teachers.dense",
    "normal": "tasks.teachers.dense",
    "semseg": "tasks.teachers.dense",
    "clip": "tasks.teachers.clip",
    "det": "tasks.teachers.detection",
    "caption": "tasks.teachers.caption",
}
"""Module of each teacher: `train(name, scenes, folder, minutes) -> scenes seen`."""

SCENES = 12_000


def main() -> None:
    """Parse the command line, train one teacher, save it."""
    import torch

    from models.labelers.base import WEIGHTS
    from tasks.teachers.data import load_scenes

    parser = argparse.ArgumentParser(prog="python -m tasks.teachers", description=main.__doc__)
    parser.add_argument("name", choices=sorted(RECIPES))
    parser.add_argument("--minutes", type=float, default=12.0, help="wall time of the training")
    parser.add_argument("--scenes", type=int, default=SCENES, help="scenes rendered for it")
    parser.add_argument("--folder", type=Path, help="where to save; the shipped weights if unset")
    parser.add_argument("--resume", action="store_true", help="go on from the weights there are")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(args.threads)
    scenes = load_scenes(args.scenes)
    recipe = importlib.import_module(RECIPES[args.name])
    folder = args.folder or WEIGHTS / args.name
    # Teachers of dense maps and of CLIP can go on; others take no such argument.
    extra = {"resume": True} if args.resume else {}
    seen = recipe.train(args.name, scenes, folder, args.minutes, **extra)
    logging.getLogger("fourm.teachers").info("%s: trained on %d scenes", args.name, seen)
