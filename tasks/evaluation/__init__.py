"""Evaluation: what a trained model reaches on pictures that it never saw."""
