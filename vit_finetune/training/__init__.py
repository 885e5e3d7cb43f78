"""Training: transformers' Trainer, made exact, with choices for the machine at hand."""
