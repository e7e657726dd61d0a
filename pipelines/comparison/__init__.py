"""Comparing runs: what each found, and one page that shows them side by side."""
