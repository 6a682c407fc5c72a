//! What all partitions of a dispatcher share.

use std::collections::BTreeMap;
use std::hash::{BuildHasher as _, Hash as _, Hasher as _, RandomState};
use std::sync::Arc;

use bytes::Bytes;
use ringback_bus::{Bus, DeliveryAnnouncer};
use ringback_contracts::{Message as _, v1};
use ringback_domain::target::{FORMAT_RUNPOD_STRICT, FORMAT_STANDARD_PROFILE, REGISTERED_TARGET_BASE};
use ringback_egress::Client;
use ringback_store::Store;
use ringback_store::deliveries::partition_of;
use uuid::Uuid;

use crate::bodies::Bodies;
use crate::book::{ChainKey, Owed, Place, Process, Rules, Standing};
use crate::clock::Clock;
use crate::directory::{Directory, View};
use crate::keyring::Keyring;
use crate::meters::Meters;
use crate::settings::Settings;

#[derive(Debug)]
pub(crate) struct Shared {
    pub settings: Settings,
    pub store: Store,
    pub bus: Bus,
    pub announcer: DeliveryAnnouncer,
    pub client: Client,
    pub directory: Directory,
    /// The database's clock: due times, signatures and what is written down go by it.
    pub clock: Arc<Clock>,
    pub process: Arc<Process>,
    /// The rules for the targets of jobs: the operator's, and those that endpoints may choose.
    pub rules: Arc<Rules>,
    pub strict: Arc<Rules>,
    pub standard: Arc<Rules>,
    pub keyring: Keyring,
    pub bodies: Bodies,
    pub meters: Meters,
    /// Keyed by chance, so that nobody can choose a URL that shares another project's gate.
    pub hasher: RandomState,
}

impl Shared {
    /// Reads a delivery; `None` for one that no correct sender makes. `from_message` says that its bytes are slices
    /// of a whole message, which they would keep in memory.
    pub(crate) fn owed(
        &self,
        view: &View,
        delivery: v1::Delivery,
        from_message: bool,
    ) -> Option<(Owed, Standing)> {
        let owner = Uuid::from_slice(&delivery.owner_id).ok()?;
        let mut body = delivery.body?;
        if from_message {
            for part in &mut body.parts {
                if let Some(v1::body_part::Part::Inline(bytes)) = &mut part.part {
                    *bytes = Bytes::copy_from_slice(bytes);
                }
            }
        }
        let target = delivery.target;
        let standing = view.standing(target, delivery.event).unwrap_or_else(|| {
            self.directory.ask(target);
            Standing::Held
        });
        let project = delivery.project_id;
        let (place, rules, url) = match view.served(target) {
            None => {
                let (host, path) = places(&delivery.url);
                let rate = self.settings.target_rate;
                let place =
                    Place { project, target: self.gate(project, path), host: self.gate(project, host), rate };
                (place, Arc::clone(self.rules_of(delivery.format)), delivery.url)
            }
            Some(served) => {
                let webhook = &served.webhook;
                let (host, _) = places(webhook.url.as_deref().unwrap_or_default());
                let place = Place {
                    project,
                    target: self.gate(project, &webhook.public_id),
                    host: self.gate(project, host),
                    rate: webhook.rate_per_second.or(self.settings.target_rate),
                };
                (place, Arc::clone(&served.rules), String::new())
            }
        };
        let url = if target < REGISTERED_TARGET_BASE { url } else { String::new() };
        let owed = Owed {
            key: ChainKey { owner, target },
            seq: delivery.seq,
            terminal: delivery.terminal,
            event: delivery.event,
            format: delivery.format,
            url,
            body,
            traceparent: delivery.traceparent,
            created_at_ms: delivery.created_at_ms,
            replays: delivery.replays,
            attempts_before: delivery.attempts_before,
            place,
            rules,
        };
        Some((owed, standing))
    }

    fn rules_of(&self, format: u32) -> &Arc<Rules> {
        match (format & FORMAT_RUNPOD_STRICT != 0, format & FORMAT_STANDARD_PROFILE != 0) {
            (true, _) => &self.strict,
            (false, true) => &self.standard,
            (false, false) => &self.rules,
        }
    }

    /// Announces deliveries that this process has inserted or opened again. What cannot be sent is found by sweeps.
    pub(crate) async fn announce(&self, deliveries: Vec<v1::Delivery>) {
        let partitions = self.store.facts().partitions;
        let mut of: BTreeMap<u16, Vec<v1::Delivery>> = BTreeMap::new();
        for delivery in deliveries {
            of.entry(partition_of(&delivery.owner_id, partitions)).or_default().push(delivery);
        }
        for (partition, deliveries) in of {
            let sent = self.announcer.announce(partition, |publisher, counter| {
                v1::DeliveryEvents { publisher, counter, deliveries }.encode_to_vec().into()
            });
            if !sent.await {
                tracing::debug!(partition, "deliveries were not announced");
            }
        }
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
