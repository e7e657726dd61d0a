"""Searching over recipes, apart from running them: objectives, trials, who proposes the next one.

Plain values only: `moe_dist/search/tune.py` runs what is proposed here on Ray Tune.
"""
