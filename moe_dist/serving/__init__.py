"""Answer texts over HTTP, on Ray Serve: what is asked, in which batches, and how fast."""
