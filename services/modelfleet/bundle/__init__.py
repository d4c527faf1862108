"""The files of one model version: names, manifest, hashes. Knows nothing of gRPC."""
