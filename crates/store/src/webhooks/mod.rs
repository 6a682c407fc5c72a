//! Registered webhooks: places that hear of many jobs.
//!
//! api-ingest writes `webhooks` and `webhook_secrets`; the dispatcher writes `webhook_health` (P8). Whoever changes
//! any of them raises `meta.registry_revision` in the same transaction.

pub mod crud;
pub mod health;
pub mod registry;
pub mod secrets;
pub mod tell;

pub use registry::{EndpointInfo, EventFacts, Registry, Webhook, bump_registry};
