"""Runs on several machines: executors for `filterwise.lab.reproduce.jobs.run_all`.

::

    options         what the command line says of a cluster
    handing         what a worker is given, and what must hold afterwards
    on_ray          Ray
    on_slurm        SLURM, through submitit

The workers write into the folder of the results themselves, which must be on a file system that all
machines share.
"""
