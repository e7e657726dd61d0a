"""What is found out before anything starts: faults, sizes, and how workers share the work."""
