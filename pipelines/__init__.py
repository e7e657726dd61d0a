"""The runnable stages and chains of moe-dist, and its command line."""
