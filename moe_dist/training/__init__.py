"""The training loop, what it is made of, and the jobs that run it on each worker."""
