"""Start launch.train on many hosts: python -m launch.pod tpu-vm | queued | xpk | slurm."""
