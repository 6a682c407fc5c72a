//! What one job says about the confirm handshake of its endpoint.

use serde::Deserialize;
use serde_json::value::RawValue;

/// Name of the member of a job.
pub const CONFIRM_MEMBER: &str = "artifact_confirm";
/// Shortest wait that a job may ask for.
pub const MIN_WAIT_MS: u64 = 100;

/// A job's own wish: whether its files wait for their receiver, and how long at most. Who the receiver is stays the
/// endpoint's to say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConfirmWish {
    /// Whether there is a wait at all.
    pub enabled: bool,
    /// The longest wait; the endpoint's where it is not told.
    pub timeout_ms: Option<u64>,
}

impl ConfirmWish {
    /// Reads the member: `true`, `false`, or `{"enabled", "timeout_ms"}`.
    ///
    /// # Errors
    /// Which part of it is wrong (empty for the whole), and what it must be.
    pub fn parse(json: &str) -> Result<Self, (&'static str, &'static str)> {
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Members<'a> {
            #[serde(borrow)]
            enabled: Option<&'a RawValue>,
            #[serde(borrow)]
            timeout_ms: Option<&'a RawValue>,
        }
        if let Ok(enabled) = serde_json::from_str(json) {
            return Ok(Self { enabled, timeout_ms: None });
        }
        let members: Members<'_> = Some(json)
            .filter(|json| json.starts_with('{'))
            .and_then(|json| serde_json::from_str(json).ok())
            .ok_or(("", "must be true, false or {\"enabled\", \"timeout_ms\"}"))?;
        let enabled = match members.enabled {
            // Whoever names a time wants the wait.
            None => true,
            Some(raw) => {
                serde_json::from_str(raw.get()).map_err(|_| ("/enabled", "must be true or false"))?
            }
        };
        let timeout_ms = members
            .timeout_ms
            .map(|raw| serde_json::from_str(raw.get()))
            .transpose()
            .map_err(|_| ("/timeout_ms", "must be a whole number of milliseconds"))?;
        Ok(Self { enabled, timeout_ms })
    }

    /// The wish in a job's further members, which were checked when it was submitted.
    #[must_use]
    pub fn of_members(members: &[u8]) -> Option<Self> {
        #[derive(Deserialize)]
        struct Members<'a> {
            #[serde(borrow)]
            artifact_confirm: Option<&'a RawValue>,
        }
        // Most jobs have none; those are not parsed.
        if !members.windows(CONFIRM_MEMBER.len()).any(|part| part == CONFIRM_MEMBER.as_bytes()) {
            return None;
        }
        let members: Members<'_> = serde_json::from_slice(members).ok()?;
        Self::parse(members.artifact_confirm?.get()).ok()
    }

    /// How long a job waits, by its wish and its endpoint: `asked_only` says that the endpoint waits only for jobs that
    /// ask for it. None: not at all. A job never waits longer than its endpoint allows.
    #[must_use]
    pub fn wait_ms(wish: Option<Self>, asked_only: bool, endpoint_ms: u64) -> Option<u64> {
        match wish {
            None => (!asked_only).then_some(endpoint_ms),
            Some(wish) => wish.enabled.then(|| wish.timeout_ms.unwrap_or(endpoint_ms).min(endpoint_ms)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forms_are_read_and_mistakes_named() {
        let of = |enabled, timeout_ms| Ok(ConfirmWish { enabled, timeout_ms });
        assert_eq!(ConfirmWish::parse("true"), of(true, None));
        assert_eq!(ConfirmWish::parse("false"), of(false, None));
        assert_eq!(ConfirmWish::parse("{}"), of(true, None));
        assert_eq!(ConfirmWish::parse(r#"{"timeout_ms": 500}"#), of(true, Some(500)));
        assert_eq!(ConfirmWish::parse(r#"{"timeout_ms": 500, "enabled": false}"#), of(false, Some(500)));
        for (json, at) in [
            ("null", ""),
            ("\"yes\"", ""),
            ("[true]", ""),
            (r#"{"receiver_url": "https://x.test"}"#, ""),
            (r#"{"enabled": 1}"#, "/enabled"),
            (r#"{"timeout_ms": -1}"#, "/timeout_ms"),
            (r#"{"timeout_ms": 1.5}"#, "/timeout_ms"),
        ] {
            assert_eq!(ConfirmWish::parse(json).unwrap_err().0, at, "{json}");
        }
    }

    #[test]
    fn the_member_is_found_among_others() {
        let of = |json: &str| ConfirmWish::of_members(json.as_bytes());
        assert_eq!(of(r#"{"policy":{},"artifact_confirm":false}"#).map(|w| w.enabled), Some(false));
        assert_eq!(of(r#"{"metadata":{"artifact_confirm":false}}"#), None);
        assert_eq!(of(""), None);
        assert_eq!(of(r#"{"policy":{}}"#), None);
    }

    #[test]
    fn the_endpoint_has_the_last_word_on_the_time() {
        let wish = |enabled, timeout_ms| Some(ConfirmWish { enabled, timeout_ms });
        for (job, asked_only, wanted) in [
            (None, false, Some(1_000)),
            (None, true, None),
            (wish(true, None), true, Some(1_000)),
            (wish(true, Some(300)), true, Some(300)),
            (wish(true, Some(9_000)), false, Some(1_000)),
            (wish(false, None), false, None),
        ] {
            assert_eq!(ConfirmWish::wait_ms(job, asked_only, 1_000), wanted, "{job:?} {asked_only}");
        }
    }
}
