"""The model: where its weights come from."""
