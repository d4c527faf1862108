"""The chassis that every service shares: settings, errors, status, interceptors, server, telemetry."""
