//! The receiving side of webhooks: verify, route, remember, download, confirm.

pub mod event;
pub mod filename;
pub mod secret;
pub mod store;
pub mod verify;

pub use event::{Event, ParseError};
pub use filename::SafeName;
pub use secret::{Secrets, SecretsError};
pub use verify::{HostList, HostListError, Proof, Refusal, Trust};
