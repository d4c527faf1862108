"""`modelfleet batch`: files of rows through a model, resumable, in order."""
