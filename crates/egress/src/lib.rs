//! The only way platform code dials a URL that came from outside.
