"""All use of transformers and peft: tokenizers, loading models, forward, generation, LoRA."""
