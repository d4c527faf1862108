"""Generated text: from a prompt to a stream of chunks."""
