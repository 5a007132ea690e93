"""What the three frameworks share: config, tokenizer, image processor, checkpoints. Imports no framework."""
