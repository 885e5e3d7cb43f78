"""Scores: metrics, and reports of a model on a split."""
