"""Training in every framework: the recipe, the resumable state, and the metrics of a run."""
