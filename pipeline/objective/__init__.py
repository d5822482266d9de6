"""The combined loss: terms, divergences, gates, the fused head."""
