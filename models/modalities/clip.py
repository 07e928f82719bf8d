"""CLIP patch features: float16 [h, w, C], the vision tower's last hidden state without CLS."""

from models.modalities._features import grid

MODALITY = grid("clip", "float16 [h, w, C] patch features")
