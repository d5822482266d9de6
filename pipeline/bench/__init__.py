"""What this costs beside what one would otherwise run."""
