"""The training loss: its terms, the divergences from the teacher, the gates that select positions, the fused head."""
