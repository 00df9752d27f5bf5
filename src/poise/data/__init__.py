"""Samplers, augmentations, corruptions, spans, builders of training records; nothing here calls a model."""
