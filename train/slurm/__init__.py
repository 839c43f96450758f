"""Recipes and searches on a SLURM cluster.

`stage.sbatch` runs a stage, `submit.py` queues all of them, `search.sbatch` runs a search.
"""
