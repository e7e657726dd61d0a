"""What runs found: the chain's report, its plots, and runs side by side."""
