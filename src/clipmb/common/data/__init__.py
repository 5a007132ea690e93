"""Images with captions or labels: tables, shards, and the batches that training and evaluation read."""
