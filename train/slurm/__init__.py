"""Recipes on a SLURM cluster: `stage.sbatch` runs a stage, `submit.py` queues all of them."""
