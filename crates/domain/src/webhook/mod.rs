//! Webhooks without I/O: bodies, signatures, retry times, what an answer means, and which URLs are allowed.
//!
//! Everything here is a function of its arguments. The clock, the dice and the network belong to the callers.

pub mod address;
pub mod body;
pub mod envelope;
mod object;
pub mod response;
pub mod runflow;
pub mod runflow_body;
pub mod schedule;
pub mod signature;
pub mod url;

use uuid::Uuid;

/// The `webhook-id` of a delivery: the same on every attempt and every replay, so that a receiver can drop
/// what it has seen (P4). `subject` is the id of the job or of the batch.
///
/// The id holds no `.`, because Standard Webhooks joins id, time and body with dots.
#[must_use]
pub fn message_id(subject: Uuid, seq: u64, target_index: u32) -> String {
    format!("msg_{}_{seq}_{target_index}", subject.simple())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn message_ids_are_stable_and_free_of_dots() {
        let id = message_id(Uuid::from_u128(0x0192_f3a4_0000_7000_8000_0000_0000_0001), 3, 1);
        assert_eq!(id, "msg_0192f3a4000070008000000000000001_3_1");
        assert!(!id.contains('.'));
    }
}
