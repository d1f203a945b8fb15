"""Launchers: each builds the exact command lines of one kind of machine, and runs or prints them.

    python -m launch.local     several processes on this machine
    python -m launch.tpu_vm    Cloud TPU VMs by queued resources, resumed after preemption
    python -m launch.gke       TPUs on GKE, by xpk or by a JobSet manifest
    python -m launch.slurm     GPU nodes, and array jobs for ladders of runs

What follows ``--`` are the arguments of ``encdec train``, passed on unchanged. ``--dry_run`` prints
what would run and starts nothing. They need only Python and their own tool (gcloud, xpk,
kubectl, sbatch), and run from a checkout. docs/pod.md is a walkthrough from an empty cloud project.
"""
