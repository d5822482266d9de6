"""A study as batch jobs of a cluster: plain sbatch files, and their submission."""
