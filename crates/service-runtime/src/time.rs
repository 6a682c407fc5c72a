//! The process's wall clock. Leases and due times are judged by the database's clock instead.

use std::time::{SystemTime, UNIX_EPOCH};

/// Milliseconds since 1970 by this host's clock.
#[must_use]
pub fn now_ms() -> i64 {
    // A clock before 1970 or beyond year 292 million is not a case to handle; 0 and MAX keep order.
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| i64::try_from(since.as_millis()).unwrap_or(i64::MAX))
}
