"""A whole backend in numpy: what a further one has to provide, and nothing else."""
