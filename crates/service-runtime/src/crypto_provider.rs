//! One TLS implementation for the whole process.

/// Installs rustls' `ring` provider as the process default. Call it at the start of `main` and of tests that use
/// TLS-capable clients; further calls do nothing. Without it, clients built with two providers in the tree panic.
pub fn install() {
    // Err means that a provider is already installed: by an earlier call.
    let _ = rustls::crypto::ring::default_provider().install_default();
}
