"""Linear students on cached hidden states of the untrained student: they rank recipes before any real training."""
