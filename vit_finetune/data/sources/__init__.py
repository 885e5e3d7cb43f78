"""Folder, archive, table, shards, Hub id or built-in name → images, labels and groups of each split."""
