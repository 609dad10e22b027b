"""Submit the branches of a run to SLURM or to processes of this machine, and read how they are doing.

Composing the commands is pure; submitting them is a few lines. No torch and no Lightning: `stl status` answers at once.
"""
