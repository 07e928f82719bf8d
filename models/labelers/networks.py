"""Which network each preset takes for each kind of labeler: the one table of them.

Licences are those that the model cards state; they bind whoever downloads the weights. Where none
of the pages that state or quote one was read, `licence_read` is False. Revisions
are the hub's default branch unless one is named; a run that must be repeatable pins its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from models.labelers.base import COMPUTED, SHIPPED


@dataclass(frozen=True, kw_only=True)
class Network:
    """A network for one kind of labeler, and what its user has to know."""

    model_id: str
    """Hub id, "shipped:NAME", or "computed"."""
    licence: str
    """Of the weights."""
    licence_read: bool = False
    """Whether it was read on the model's card, or in a catalogue that quotes it."""
    resolution: str
    """What the network sees of an image."""
    revision: str = ""
    """Commit or tag of the hub; empty for its default branch."""
    note: str = ""
    """How it differs from the network that 4M used, where it does."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Of the labeler's class."""


def _shipped(kind: str, resolution: str) -> Network:
    return Network(model_id=SHIPPED + kind, licence="Apache-2.0", licence_read=True,
                   resolution=resolution)


_DINOV2 = Network(
    model_id="facebook/dinov2-base",
    revision="f9e44c814b77203eaa57a6bdbbd535f21ede1415",
    licence="Apache-2.0", licence_read=True,
    resolution="224 x 224",
    options={"image_size": 224},
)


_ANALYTIC = {
    "color_palette": Network(
        model_id=COMPUTED,
        licence="none needed",
        licence_read=True,
        resolution="64 x 64 pixels of any size",
    ),
    "canny_edge": Network(
        model_id=COMPUTED,
        licence="none needed",
        licence_read=True,
        resolution="full",
    ),
    "metadata": Network(
        model_id=COMPUTED,
        licence="none needed",
        licence_read=True,
        resolution="at most 1 Mpx, evenly thinned",
    ),
}

SCENES: dict[str, Network] = {
    "depth": _shipped("depth", "as it is"),
    "normal": _shipped("normal", "128 x 128"),
    "semseg": _shipped("semseg", "192 x 192"),
    "det": _shipped("det", "128 x 128"),
    "caption": _shipped("caption", "144 x 144"),
    "clip": _shipped("clip", "128 x 128"),
    "dinov2": _shipped("dinov2", "128 x 128"),
    **_ANALYTIC,
    "metadata": replace(
        _ANALYTIC["metadata"], options={"walkable": [1], "things": [2, 3, 4, 5]}
    ),
}
"""Tiny teachers of rendered scenes, shipped with the package."""

MODERN: dict[str, Network] = {
    "depth": Network(
        model_id="depth-anything/Depth-Anything-V2-Small-hf",
        licence="Apache-2.0", licence_read=True,
        resolution="whichever side is nearer to 518, multiples of 14",
        options={"scale": "inverse"},
    ),
    "normal": Network(
        model_id="google/tipsv2-b14-dpt",
        licence="Apache-2.0",
        licence_read=True,
        resolution="of its processor",
    ),
    "semseg": Network(
        model_id="facebook/mask2former-swin-base-coco-panoptic",
        licence="other (model card; the code is MIT)",
        resolution="384 x 384",
    ),
    "det": Network(
        model_id="PekingU/rtdetr_v2_r18vd",
        licence="Apache-2.0",
        licence_read=True,
        resolution="640 x 640",
    ),
    "caption": Network(
        model_id="Salesforce/blip-image-captioning-base",
        licence="BSD-3-Clause", licence_read=True,
        resolution="384 x 384",
    ),
    "clip": Network(
        model_id="openai/clip-vit-base-patch16", licence="MIT (code)", resolution="224 x 224"
    ),
    **_ANALYTIC,
    "dinov2": _DINOV2,
    "imagebind": Network(
        model_id="google/siglip2-base-patch16-224",
        licence="Apache-2.0",
        resolution="224 x 224",
        note="SigLIP 2 in place of ImageBind (CC-BY-NC-SA): shares its vectors with text alone, "
        "768 numbers instead of 1280",
    ),
    "sam": Network(
        model_id="facebook/sam-vit-base",
        licence="Apache-2.0",
        licence_read=True,
        resolution="longer side 1024",
    ),
    "human_poses": Network(
        model_id="usyd-community/vitpose-base-simple",
        licence="Apache-2.0", licence_read=True,
        resolution="256 x 192 a person",
        note="2-D keypoints in place of the SMPL bodies of HMR2.0 (non-commercial)",
    ),
    "t5_caption": Network(
        model_id="google/flan-t5-large",
        licence="Apache-2.0",
        resolution="77 tokens",
        note="1024 numbers a token instead of 4096",
    ),
}
"""Networks of the hub for photographs, permissive where there is a choice."""

RELEASED: dict[str, Network] = {
    **MODERN,
    "depth": Network(
        model_id="Intel/dpt-hybrid-midas",
        licence="Apache-2.0", licence_read=True,
        resolution="384 x 384",
        note="the architecture of Omnidata's DPT-Hybrid with MiDaS weights; Omnidata's do not "
        "load from the hub",
        options={"scale": "inverse"},
    ),
    "normal": replace(
        MODERN["normal"], note="in place of Omnidata's DPT-Hybrid, which no kept package loads"
    ),
    "semseg": replace(MODERN["semseg"], note="the network of 4M"),
    "det": Network(
        model_id="ustc-community/dfine-xlarge-obj2coco",
        licence="Apache-2.0 (code)",
        resolution="640 x 640",
        note="in place of ViTDet ViT-H with a cascade, which no kept package loads; both know "
        "the 80 classes of COCO",
    ),
    "caption": replace(
        MODERN["caption"],
        note="4M kept the captions of the list: leave this labeler out to do the same",
    ),
    "clip": replace(
        MODERN["clip"],
        note="the network of 4M, and its 512 numbers a patch: normed and projected",
        options={"projected": True},
    ),
    "dinov2": replace(_DINOV2, note="the network of 4M-21"),
    "imagebind": Network(
        model_id="nielsr/imagebind-huge",
        licence="CC-BY-NC-SA-4.0", licence_read=True,
        resolution="224 x 224",
        note="the network of 4M-21, non-commercial; implemented here",
    ),
    "sam": Network(
        model_id="ybelkada/segment-anything",
        licence="Apache-2.0", licence_read=True,
        resolution="longer side 1024",
        note="the network and the checkpoint of 4M-21 (SAM ViT-H) by the package "
        "segment-anything, out of a copy of the published files on the hub",
        options={"network": "vit_h", "checkpoint": "checkpoints/sam_vit_h_4b8939.pth"},
    ),
    "t5_caption": Network(
        model_id="google/t5-v1_1-xxl",
        licence="Apache-2.0",
        resolution="77 tokens",
        note="T5-XXL as in 4M-21",
        options={"tokenizer": "google-t5/t5-small"},
    ),
}
"""Networks that 4M and 4M-21 used, wherever they load today; what stands in for the others."""

PRESETS: dict[str, dict[str, Network]] = {
    "scenes": SCENES, "modern": MODERN, "released": RELEASED,
}  # fmt: skip
