"""What training shares among frameworks: the recipe, the resumable state, and the metrics of a run."""
