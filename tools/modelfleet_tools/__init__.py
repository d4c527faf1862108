"""The `modelfleet` command, and what tests and measurements share with it."""
