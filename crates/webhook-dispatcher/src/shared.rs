//! What all partitions of a dispatcher share.

use std::hash::{BuildHasher as _, Hash as _, Hasher as _, RandomState};

use bytes::Bytes;
use ringback_bus::Bus;
use ringback_contracts::v1;
use ringback_egress::Client;
use ringback_store::Store;
use uuid::Uuid;

use crate::bodies::Bodies;
use crate::book::{ChainKey, Owed};
use crate::keyring::Keyring;
use crate::meters::Meters;
use crate::settings::Settings;

#[derive(Debug)]
pub(crate) struct Shared {
    pub settings: Settings,
    pub store: Store,
    pub bus: Bus,
    pub client: Client,
    pub keyring: Keyring,
    pub bodies: Bodies,
    pub meters: Meters,
    /// Keyed by chance, so that nobody can choose a URL that shares another project's gate.
    pub hasher: RandomState,
}

impl Shared {
    /// Reads a delivery; `None` for one that no correct sender makes. `from_message` says that its bytes are slices
    /// of a whole message, which they would keep in memory.
    pub(crate) fn owed(&self, delivery: v1::Delivery, from_message: bool) -> Option<Owed> {
        let owner = Uuid::from_slice(&delivery.owner_id).ok()?;
        let mut body = delivery.body?;
        if from_message {
            for part in &mut body.parts {
                if let Some(v1::body_part::Part::Inline(bytes)) = &mut part.part {
                    *bytes = Bytes::copy_from_slice(bytes);
                }
            }
        }
        let (host, path) = places(&delivery.url);
        Some(Owed {
            key: ChainKey { owner, target: delivery.target },
            seq: delivery.seq,
            project: delivery.project_id,
            terminal: delivery.terminal,
            event: delivery.event,
            gate: self.gate(delivery.project_id, path),
            host: self.gate(delivery.project_id, host),
            url: delivery.url,
            body,
            traceparent: delivery.traceparent,
            created_at_ms: delivery.created_at_ms,
        })
    }

    fn gate(&self, project: i64, place: &str) -> u64 {
        let mut hasher = self.hasher.build_hasher();
        project.hash(&mut hasher);
        place.hash(&mut hasher);
        hasher.finish()
    }
}

/// Scheme, name and port of a URL, and the URL without query and fragment.
fn places(url: &str) -> (&str, &str) {
    let path_end = url.find(['?', '#']).unwrap_or(url.len());
    let path = &url[..path_end];
    let name = path.find("://").map_or(0, |at| at + 3);
    let host_end = path[name..].find('/').map_or(path.len(), |at| name + at);
    (&path[..host_end], path)
}

#[cfg(test)]
mod tests {
    use super::places;

    #[test]
    fn places_leave_out_what_varies() {
        assert_eq!(
            places("https://a.example:8/x/y?z=1#f"),
            ("https://a.example:8", "https://a.example:8/x/y")
        );
        assert_eq!(places("http://a.example"), ("http://a.example", "http://a.example"));
        assert_eq!(places("http://a.example?q=/x"), ("http://a.example", "http://a.example"));
        assert_eq!(places(""), ("", ""));
    }
}
