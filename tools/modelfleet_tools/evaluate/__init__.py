"""`modelfleet evaluate`: a served model measured on labelled data."""
