//! What every service needs to run: configuration, telemetry, health, metrics, shutdown, blobs, redaction.
