"""Embeddings, classification and search over HTTP: what programs and people ask, computed in batches."""
