//! End-to-end tests and the bench of Ringback.
