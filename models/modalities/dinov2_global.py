"""DINOv2 of the whole image: float16 [C], the class token after the network's norm."""

from models.modalities._features import vector

MODALITY = vector("dinov2_global", "float16 [C], one vector of the whole image")
