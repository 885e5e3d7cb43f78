"""Train, validation and test: carved by hash, kept in files, read back, prepared for a run."""
