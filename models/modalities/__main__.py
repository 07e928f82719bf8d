"""Prints the page of all modalities, labelers and networks:

python -m models.modalities > docs/modalities.md
"""

from __future__ import annotations

import sys
from collections.abc import Iterable

from models import modalities
from models.labelers.networks import PRESETS, Network
from models.labelers.registry import KINDS, labeler_class, outputs

RELEASED = {
    "rgb": ("rgb@224, tok_rgb@224", "16,384", "196 (784 at 448)"),
    "caption": ("caption", "30,000", "up to 256"),
    "det": ("det", "30,000", "up to 256"),
    "depth": ("tok_depth@224", "8,192", "196 (784 at 448)"),
    "normal": ("tok_normal@224", "8,192", "196 (784 at 448)"),
    "semseg": ("tok_semseg@224", "4,096", "196 (784 at 448)"),
    "clip": ("tok_clip@224", "8,192", "196 (784 at 448)"),
    "t5_caption": ("t5_caption", "none: embeddings", "up to 77, input only"),
    "metadata": ("metadata", "30,000", "up to 40"),
    "human_poses": ("human_poses", "30,000", "up to 275"),
    "color_palette": ("color_palette", "30,000", "up to 23"),
    "sam_instance": ("sam_instance", "30,000", "up to 290"),
    "canny_edge": ("tok_canny_edge@224", "8,192", "196"),
    "sam_edge": ("tok_sam_edge@224", "8,192", "196"),
    "dinov2": ("tok_dinov2@224", "8,192", "256"),
    "dinov2_global": ("tok_dinov2_global", "8,192", "16"),
    "imagebind": ("tok_imagebind@224", "8,192", "256"),
    "imagebind_global": ("tok_imagebind_global", "8,192", "16"),
}
"""Names, vocabulary and tokens in the released models, by our names."""

_HEAD = """\
# Modalities, labelers and networks

Written by `python -m models.modalities > docs/modalities.md`; a test holds that it is current.
How to add one of your own: [your-own-modality.md](your-own-modality.md).

## Modalities

Values are what a labeler writes and a tokenizer reads. Vocabulary and tokens are those of the
released 4M-7 and 4M-21 models; tokenizers that are trained here follow their recipes.

"""
_TEXTS = """
## Sequences

Captions, boxes, metadata, palettes, poses and instances are told as text, in words of the text
tokenizer: ordinary words, and numbers `v0=` to `v3=` of as many steps as it has coordinate bins.
With the 1,000 bins of the released vocabulary the formats are the released ones but for poses.

"""
_TEXT_FORMS = (
    ("`caption`", "the caption", "nothing but case and blanks"),
    ("`det`", "`v0=xmin v1=ymin v2=xmax v3=ymax class`, nearest corner first",
     "shares of the crop to a bin"),
    ("`metadata`", "`v1=type v0=level` a field",
     "qualities to 50 levels, sizes to 32 px, counts clipped to the bins"),
    ("`color_palette`", "`v1=n`, then 3 n times `v0=`; which of the palettes is drawn a crop",
     "colours, with fewer than 256 bins"),
    ("`human_poses`", "`none`, or a person `human` box `pose`, then 17 times `v0=x v1=y` or `none`",
     "shares of the crop to a bin"),
    ("`sam_instance`", "at 7 points drawn a crop: `point` place, then `none`, or `polygon` box and "
     "16 codes of each mask there", "masks to codes; places, with fewer bins than pixels"),
)
_POSES = """
Poses are 2-D keypoints: the released models tell parameters of the SMPL body model instead, whose
network and model may not be used freely. `models.modalities.human_poses.RELEASED_TEXT` writes and
reads that text for released checkpoints: `Generator(..., forms={"human_poses": RELEASED_TEXT})`.
`t5_caption` has no text: its vectors are published as they are, and models take them as an input.
What a model writes is read tolerantly: incomplete or contradictory entries are left out, numbers
out of range are clipped.
"""
_LABELERS = """
## Labelers

One labeler runs one network once and writes all of its modalities. `fourm label --labelers` takes
these names. What a labeler reads beside the picture is labelled before it; in brackets: as far as
it is there.

"""
_BATCHES = """
Pictures are batched by the shape in which a network sees them (the column `sees` below), whatever
their own sizes: a picture waits for its like while at most 34 megapixels (100 MB) wait, so that a
set of many aspect ratios fills its batches too: of 2,000 pictures in 365 sizes, batches of 8 hold
7.5 for Depth Anything, where pictures of one size in the 16 next ones make batches of 1.1. Resizing
and normalising run on the network's device, and a label does not depend on what else was in its
batch. A worker decodes pictures and encodes labels on all of its cores meanwhile: the PNG of a
depth or normal map of 256 x 341 pixels takes about 8 ms of one (measured at 128 x 128), so that a
GPU which labels 500 pictures a second keeps four or five busy.

    fourm label --resources '{"depth": {"gpus": 0.5, "batch_size": 64, "compile": true}}'

gives one labeler workers, a batch and GPUs of its own and runs its network through torch.compile:
a minute or more for each shape of its input, up to torch's limit of 8 shapes (others run as they
are). That is for large sets and networks that see one shape: on a CPU the shipped networks take
between half and 1.4 times the time afterwards, and no GPU was at hand to measure it. It needs g++
on CPUs and triton on GPUs; the run stops before its first picture where they are missing. Where
compiling itself fails the log says so, and the network runs as it is.
Labels keep their fingerprint, as with another batch size or device: all of these add up the same
products in another order and move a value by its last bits. %s
have no network to compile; of `caption` the part that looks at the picture is compiled, of `sam`
the encoder.
"""
_PRESETS = {
    "scenes": "Tiny networks that were trained on rendered scenes and ship with the package, and "
    "what is computed. Nothing is downloaded.",
    "modern": "Networks of the Hugging Face hub for photographs, permissive where there is a "
    "choice.",
    "released": "The networks of 4M and 4M-21 as far as they load today, and what stands in for "
    "the others.",
}
_NETWORKS = """
## Networks of the preset `{name}`

{text}

"""
_FOOT = """
Licences are those of the weights as their model cards state them, or catalogues that quote them;
where no such page was read they bear a * and are from memory: read the card first. Without a
revision the hub's default branch is taken: name one for a run that must be repeatable
(`--models '{"depth": "org/name@revision"}'`). No network of the hub has been run on its real
weights by the tests, which load the same classes from tiny checkpoints through the same code.
"""


def document() -> str:
    """The page, as Markdown."""
    parts = [_HEAD, _table(("modality", "file", "value", "released name", "vocabulary", "tokens"),
                           _modalities())]  # fmt: skip
    parts += [_TEXTS, _table(("modality", "text", "what is rounded"), _TEXT_FORMS), _POSES]
    parts += [_LABELERS, _table(("labeler", "writes", "reads"), _labelers())]
    parts.append(_BATCHES % _listed(kind for kind in KINDS if not labeler_class(kind).compiles))
    for name, networks in PRESETS.items():
        parts.append(_NETWORKS.format(name=name, text=_PRESETS[name]))
        header = ("labeler", "network", "revision", "licence of the weights", "sees", "note")
        parts.append(_table(header, (_network(kind, each) for kind, each in networks.items())))
    return "".join([*parts, _FOOT])


def _modalities() -> Iterable[tuple[str, ...]]:
    for name in RELEASED:
        modality = modalities.get(name)
        yield (f"`{name}`", f".{modality.ext}", modality.description, *RELEASED[name])


def _labelers() -> Iterable[tuple[str, ...]]:
    for kind in KINDS:
        written = ", ".join(f"`{name}`" for name in outputs(kind))
        found = labeler_class(kind)
        reads = [*found.reads, *(f"({name})" for name in found.also_reads)]
        yield (f"`{kind}`", written, ", ".join(reads))


def _listed(names: Iterable[str]) -> str:
    *first, last = (f"`{name}`" for name in names)
    return f"{', '.join(first)} and {last}"


def _network(kind: str, network: Network) -> tuple[str, ...]:
    revision = network.revision or "-"
    licence = network.licence if network.licence_read else f"{network.licence} *"
    return (
        f"`{kind}`", f"`{network.model_id}`", revision, licence, network.resolution,
        network.note or "-",
    )  # fmt: skip


def _table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


if __name__ == "__main__":
    sys.stdout.write(document())
