//! The facts to be written down.

use ringback_domain::webhook::response::{Reason, TransportFault, Verdict};
use ringback_store::deliveries::{DeliveryState, FailedAttempt, Timings};

use super::{Change, Owed, Sign, Tried};

/// Whether an end of the job makes this delivery needless.
pub(super) fn may_be_superseded(owed: &Owed) -> bool {
    !owed.terminal && !owed.rules.strict_order && owed.replays == 0
}

/// The change of a delivery that ends now.
pub(super) fn ended(owed: &Owed, state: DeliveryState, attempts: u32, now_ms: i64) -> Change {
    Change {
        key: owed.key,
        seq: owed.seq,
        state,
        attempts,
        next_attempt_at_ms: None,
        ended_at_ms: Some(now_ms),
        last_status: None,
        last_error: None,
        failed: None,
        duration_ms: None,
        timings: Timings::default(),
        address: None,
        response: None,
        replays: owed.replays,
        project: owed.place.project,
        event: owed.event,
        sign: None,
        by_standing: false,
        created_at_ms: owed.created_at_ms,
    }
}

pub(super) fn sign_of(tried: &Tried) -> Option<Sign> {
    match tried.verdict {
        Verdict::Delivered => Some(Sign::Works),
        Verdict::Dead(Reason::Gone) => Some(Sign::Gone),
        // A body that we cannot read says nothing about its receiver.
        Verdict::Retry(Reason::Transport(TransportFault::Body), _) => None,
        Verdict::Dead(_) | Verdict::Retry(..) => Some(Sign::Fails),
    }
}

pub(super) fn failure(change: Change, reason: Reason, state: DeliveryState, tried: &Tried) -> Change {
    let error = match &tried.detail {
        Some(detail) => format!("{reason}: {detail}"),
        None => reason.to_string(),
    };
    Change {
        state,
        last_error: Some(error.clone()),
        failed: Some(FailedAttempt {
            at_ms: tried.began_at_ms,
            duration_ms: tried.duration_ms,
            status: tried.status,
            error: Some(error),
            address: tried.address.clone(),
            response: tried.response.clone(),
            timings: tried.timings,
        }),
        ..change
    }
}
