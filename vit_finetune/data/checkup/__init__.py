"""What is wrong with the data: every image read once, findings about images and about the set."""
