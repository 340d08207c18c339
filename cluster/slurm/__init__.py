"""Sweeps as jobs of SLURM: the batch file, what runs on the job's nodes, and what submits and follows jobs."""
