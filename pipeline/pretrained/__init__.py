"""Pretrained weights: where they come from, and how they get into a new network."""
