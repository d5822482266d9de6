"""transformers behind one door: paths, tokenizers, loading, forward, generation, LoRA."""
