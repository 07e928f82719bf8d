"""The networks that label scenes: how they are trained, on what, and what they reach.

Run `python -m tasks.teachers NAME` to train one again into the shipped weights.
"""

from __future__ import annotations

import argparse
import importlib
import logging
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tasks.teachers.teaching import Teacher

TEACHERS = {
    "depth": "tasks.teachers.dense:DepthTeacher",
    "normal": "tasks.teachers.dense:NormalTeacher",
    "semseg": "tasks.teachers.dense:SemsegTeacher",
    "clip": "tasks.teachers.clip:ClipTeacher",
    "dinov2": "tasks.teachers.dinov2:Dinov2Teacher",
    "det": "tasks.teachers.detection:DetectionTeacher",
    "caption": "tasks.teachers.caption:CaptionTeacher",
}

SCENES = 12_000
RUNS = Path("data/teachers")


def teacher(name: str) -> type[Teacher]:
    """The class of a teacher, a key of `TEACHERS`."""
    module, _, kind = TEACHERS[name].partition(":")
    return getattr(importlib.import_module(module), kind)


def main() -> None:
    """Train one teacher and save it."""
    from models.labelers.base import WEIGHTS
    from tasks.teachers.data import load_scenes
    from tasks.teachers.teaching import teach

    parser = argparse.ArgumentParser(prog="python -m tasks.teachers", description=main.__doc__)
    parser.add_argument("name", choices=sorted(TEACHERS))
    parser.add_argument("--steps", type=int, help="optimizer steps; as the shipped one if unset")
    parser.add_argument("--scenes", type=int, default=SCENES, help="scenes rendered for it")
    parser.add_argument("--folder", type=Path, help="where to save; the shipped weights if unset")
    parser.add_argument("--resume", action="store_true", help="go on from the weights there are")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: torch's choice")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    kind, folder = teacher(args.name), args.folder or WEIGHTS / args.name
    steps = args.steps or kind.steps
    learner = kind(load_scenes(args.scenes), folder if args.resume else None)
    run = RUNS / f"{args.name}-{steps}{'-resumed' if args.resume else ''}"
    teach(learner, folder, run, steps, threads=args.threads)
