"""DINOv2 patch features: float16 [h, w, C], the last hidden state without CLS, after its norm."""

from models.modalities._features import grid

MODALITY = grid("dinov2", "float16 [h, w, C] patch features")
