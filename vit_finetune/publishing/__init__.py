"""Papers about a finished run, from its folder alone and without torch: report.html and the model card."""
