"""modelfleet: models as a service over gRPC."""
