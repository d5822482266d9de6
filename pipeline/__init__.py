"""Weak-to-strong offline distillation: capture a weak teacher's logits once, train strong students on them."""

__version__ = "0.1.0"
