"""What a SLURM job does around its ranks: before them, and after they have left."""
