"""Reaching a cluster: what a job must keep elsewhere, packing, submission, and the manifests."""
