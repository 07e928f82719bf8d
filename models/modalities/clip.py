"""CLIP patch features: float16 [h, w, C], the vision tower's last hidden state without CLS; those
of the released models have gone through its last norm and projection."""

from models.modalities._features import grid

MODALITY = grid("clip", "float16 [h, w, C] patch features")
