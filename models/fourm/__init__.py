"""The 4M network: configuration, batch, masking, model, released checkpoints."""
