"""The chain and what its stages share: directories, fingerprints, recovery, records."""
