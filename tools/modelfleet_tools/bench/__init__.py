"""`modelfleet bench`: load on a running cluster, and how it answers."""
