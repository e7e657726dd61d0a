"""The training loop and what it is made of: losses, metrics, what learns beside the student."""
