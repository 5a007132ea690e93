"""Text to ids: cleaning, byte-pair encoding, rows, and the two tokenizers."""
