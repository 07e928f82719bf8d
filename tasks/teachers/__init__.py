"""The networks that label scenes: how they are trained, on what, and what they reach."""
