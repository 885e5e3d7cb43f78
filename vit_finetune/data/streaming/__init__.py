"""Shards read front to back: what must be known before training, and batches while it runs."""
