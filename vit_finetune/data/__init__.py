"""Images and labels: where they come from, how they are split, checked, and turned into pixel values."""
