//! `/v1`: Ringback's own routes. Errors are RFC 9457 problem+json with a pointer to each field.

pub(crate) mod artifacts;
pub(crate) mod batches;
pub(crate) mod deliveries;
pub(crate) mod delivery_filter;
pub(crate) mod events;
pub(crate) mod feed;
pub(crate) mod files;
pub(crate) mod job_view;
pub(crate) mod jobs;
pub(crate) mod project;
pub(crate) mod replays;
pub(crate) mod usage;
pub(crate) mod webhook_fields;
pub(crate) mod webhook_secrets;
pub(crate) mod webhooks;

use std::collections::HashMap;

use crate::error::ApiError;

/// Most entries of one page.
pub(crate) const PAGE_MAX: u32 = 500;
const PAGE_DEFAULT: u32 = 50;

/// `?limit=` of a list.
pub(crate) fn limit_of(query: &HashMap<String, String>) -> Result<u32, ApiError> {
    match query.get("limit") {
        None => Ok(PAGE_DEFAULT),
        Some(text) => text.parse::<u32>().ok().filter(|n| (1..=PAGE_MAX).contains(n)).ok_or_else(|| {
            ApiError::bad_request(format!(
                "the query parameter `limit` must be a number from 1 to {PAGE_MAX}"
            ))
        }),
    }
}

/// A query parameter that is read by `parse`.
pub(crate) fn parameter<T>(
    query: &HashMap<String, String>,
    name: &str,
    expected: &str,
    parse: impl Fn(&str) -> Option<T>,
) -> Result<Option<T>, ApiError> {
    match query.get(name).filter(|text| !text.is_empty()) {
        None => Ok(None),
        Some(text) => parse(text)
            .map(Some)
            .ok_or_else(|| ApiError::bad_request(format!("the query parameter `{name}` must be {expected}"))),
    }
}
