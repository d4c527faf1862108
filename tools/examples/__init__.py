"""Worked examples: torch modules of their own, exported by `modelfleet export --module`."""
