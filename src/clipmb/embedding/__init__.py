"""Embeddings of whole collections on disk: how they are made, what made them, and search in them."""
