//! Which deliveries a client means: in queries of lists and of the feed, and in the bodies of replays.

use std::collections::{BTreeMap, HashMap};

use ringback_domain::{
    BatchId, EndpointId, JobId,
    event::{EventType, Filter},
    target::{REGISTERED_TARGET_BASE, registered_webhook},
    webhook::message_id,
};
use ringback_store::{
    StoreError,
    deliveries::{DeliveryState, event_name},
    delivery_search::DeliveryFilter,
    replays::ReplayFilter,
    webhooks::crud,
};
use serde_json::{Value, json};
use uuid::Uuid;

use super::webhooks::absent;
use crate::{auth::Principal, error::ApiError, render::rfc3339, state::Api};

/// Codes of the events that patterns such as `job.*` name.
pub(super) fn events_of(patterns: &[String], pointer: &str) -> Result<Vec<u32>, ApiError> {
    let filter = Filter::new(patterns, Vec::new(), BTreeMap::new())
        .map_err(|e| ApiError::field(e.pointer().replacen("/events", pointer, 1), e.to_string()))?;
    let named = EventType::ALL.iter().filter(|t| filter.choose((**t).into()).is_some());
    Ok(named.map(|t| t.code()).collect())
}

/// The target of a registered webhook of the project, whether it still exists or not.
pub(crate) async fn target_of(api: &Api, who: &Principal, webhook: &str) -> Result<u32, ApiError> {
    let key = crud::key_of(api.store.read(), who.project, webhook).await?.ok_or_else(absent)?;
    let key = u32::try_from(key).map_err(|_| StoreError::corrupt("webhooks.id"))?;
    Ok(REGISTERED_TARGET_BASE.saturating_add(key))
}

/// The key of a job, batch or event by any of its public forms.
pub(super) fn owner_of(text: &str) -> Option<Uuid> {
    if let Ok((id, _)) = JobId::parse_public(text) {
        return Some(Uuid::from_bytes(*id.as_bytes()));
    }
    JobId::parse_simple(text).ok().map(|id| Uuid::from_bytes(*id.as_bytes()))
}

/// A `webhook-id` taken apart: owner, sequence and target.
pub(crate) fn parse_message_id(text: &str) -> Option<(Uuid, u32, u32)> {
    let mut parts = text.strip_prefix("msg_")?.split('_');
    let owner = BatchId::parse_simple(parts.next()?).ok()?;
    let (seq, target) = (parts.next()?.parse().ok()?, parts.next()?.parse().ok()?);
    parts.next().is_none().then(|| (Uuid::from_bytes(*owner.as_bytes()), seq, target))
}

/// A moment: RFC 3339, Unix seconds or milliseconds, or a time ago such as `15m`, `24h`, `7d`.
pub(super) fn moment(text: &str, now_ms: i64) -> Option<i64> {
    if let Some(unit) = text.chars().last().filter(|c| "smhd".contains(*c)) {
        let n: i64 = text[..text.len() - 1].parse().ok().filter(|n| *n >= 0)?;
        let ms = match unit {
            's' => 1_000,
            'm' => 60_000,
            'h' => 3_600_000,
            _ => 86_400_000,
        };
        return Some(now_ms.saturating_sub(n.saturating_mul(ms)));
    }
    if let Ok(n) = text.parse::<i64>() {
        // Seconds until the year 5138, milliseconds above.
        return Some(if n.abs() < 100_000_000_000 { n * 1_000 } else { n });
    }
    rfc3339_ms(text)
}

fn rfc3339_ms(text: &str) -> Option<i64> {
    let text = text.replace(' ', "+");
    let bytes = text.as_bytes();
    if !text.is_ascii() || bytes.len() < 20 || !matches!(bytes[10], b'T' | b't') {
        return None;
    }
    let number = |from: usize, to: usize| text.get(from..to)?.parse::<i64>().ok().filter(|n| *n >= 0);
    let (year, month, day) = (number(0, 4)?, number(5, 7)?, number(8, 10)?);
    let (hour, minute, second) = (number(11, 13)?, number(14, 16)?, number(17, 19)?);
    if bytes[4] != b'-' || bytes[7] != b'-' || bytes[13] != b':' || bytes[16] != b':' {
        return None;
    }
    if !(1..=12).contains(&month) || !(1..=31).contains(&day) || hour > 23 || minute > 59 || second > 60 {
        return None;
    }
    let mut rest = &text[19..];
    let mut ms = 0;
    if let Some(fraction) = rest.strip_prefix('.') {
        let digits = fraction.bytes().take_while(u8::is_ascii_digit).count();
        let shown = format!("{:0<3}", &fraction[..digits.min(3)]);
        ms = shown.parse::<i64>().ok().filter(|_| digits > 0)?;
        rest = &fraction[digits..];
    }
    let offset_min = match rest.as_bytes() {
        [b'Z' | b'z'] => 0,
        [sign @ (b'+' | b'-'), _, _, b':', _, _] => {
            let (h, m) = (rest[1..3].parse::<i64>().ok()?, rest[4..6].parse::<i64>().ok()?);
            if *sign == b'-' { -(h * 60 + m) } else { h * 60 + m }
        }
        _ => return None,
    };
    // Howard Hinnant's days_from_civil.
    let y = year - i64::from(month <= 2);
    let era = y.div_euclid(400);
    let yoe = y.rem_euclid(400);
    let doy = (153 * (month + if month > 2 { -3 } else { 9 }) + 2) / 5 + day - 1;
    let doe = yoe * 365 + yoe / 4 - yoe / 100 + doy;
    let days = era * 146_097 + doe - 719_468;
    Some(((days * 24 + hour) * 60 + minute - offset_min) * 60_000 + second * 1_000 + ms)
}

/// `state=dead,pending` and the like.
pub(super) fn state_of(word: &str) -> Option<DeliveryState> {
    DeliveryState::ALL.into_iter().find(|s| s.as_str() == word)
}

fn words(text: &str) -> Vec<String> {
    text.split(',').map(|word| word.trim().to_owned()).filter(|word| !word.is_empty()).collect()
}

/// The filter of a query: `state, type(s), endpoint, webhook, job, batch, from, to`.
pub(super) async fn of_query(
    api: &Api,
    who: &Principal,
    query: &HashMap<String, String>,
) -> Result<DeliveryFilter, ApiError> {
    let given = |name: &str| query.get(name).map(String::as_str).filter(|text| !text.is_empty());
    let wrong = |name: &str, expected: &str| {
        ApiError::bad_request(format!("the query parameter `{name}` must be {expected}"))
    };
    let mut filter = DeliveryFilter::default();
    if let Some(text) = given("state").or(given("states")) {
        for word in words(text) {
            let expected = "pending, delivered, dead, superseded or cancelled (several joined by commas)";
            filter.states.push(state_of(&word).ok_or_else(|| wrong("state", expected))?.code());
        }
    }
    if let Some(text) = given("types").or(given("type")) {
        filter.events = events_of(&words(text), "/types")
            .map_err(|e| ApiError::bad_request(format!("the query parameter `types`: {}", e.detail)))?;
    }
    if let Some(name) = given("endpoint") {
        filter.endpoint = Some(api.catalog.find(who.project, name)?.id.0);
    }
    if let Some(webhook) = given("webhook") {
        filter.target = Some(target_of(api, who, webhook).await?);
    }
    for name in ["job", "batch"] {
        if let Some(text) = given(name) {
            filter.owner = Some(owner_of(text).ok_or_else(|| wrong(name, "an id"))?);
        }
    }
    let now = api.store.now_ms().await?;
    let expected = "a time such as 2026-11-21T12:00:00Z, Unix seconds, or a time ago such as 24h";
    if let Some(text) = given("from") {
        filter.from_ms = Some(moment(text, now).ok_or_else(|| wrong("from", expected))?);
    }
    if let Some(text) = given("to") {
        filter.to_ms = Some(moment(text, now).ok_or_else(|| wrong("to", expected))?);
    }
    Ok(filter)
}

/// The filter of a replay as a client wrote it.
pub(super) fn shown(api: &Api, names: &HashMap<i64, String>, filter: &ReplayFilter) -> Value {
    if let Some(key) = filter.delivery {
        return json!({"delivery": message_id(key.owner, u64::from(key.seq), key.target)});
    }
    json!({
        "from": filter.from_ms.map(rfc3339),
        "to": filter.to_ms.map(rfc3339),
        "types": filter.events.iter().map(|code| event_name(*code)).collect::<Vec<_>>(),
        "endpoint": filter.endpoint_id.map(|id| api.catalog.name_of(EndpointId(id)).to_string()),
        "webhook": filter.target.and_then(|t| webhook_name(names, t)),
        "states": filter.states.iter()
            .filter_map(|code| DeliveryState::from_code(i64::from(*code)))
            .map(DeliveryState::as_str).collect::<Vec<_>>(),
    })
}

/// The public id of the registered webhook that a target is.
pub(super) fn webhook_name(names: &HashMap<i64, String>, target: u32) -> Option<String> {
    names.get(&i64::from(registered_webhook(target)?)).cloned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_are_read_as_people_write_them() {
        let now = 1_800_000_000_000;
        for (text, ms) in [
            ("2023-11-14T22:13:20Z", 1_700_000_000_000),
            ("2023-11-14T22:13:20.1234567Z", 1_700_000_000_123),
            ("2023-11-14T23:13:20+01:00", 1_700_000_000_000),
            ("2023-11-14T23:13:20 01:00", 1_700_000_000_000),
            ("2000-02-29T00:00:00.000-00:30", 951_784_200_000),
            ("1700000000", 1_700_000_000_000),
            ("1700000000123", 1_700_000_000_123),
            ("24h", now - 86_400_000),
            ("0s", now),
        ] {
            assert_eq!(moment(text, now), Some(ms), "{text}");
        }
        for text in [
            "",
            "now",
            "-3h",
            "2023-11-14",
            "2023-13-14T22:13:20Z",
            "2023-11-14T22:13:20",
            "é5555555555555555555",
        ] {
            assert_eq!(moment(text, now), None, "{text}");
        }
    }

    #[test]
    fn webhook_ids_are_taken_apart() {
        let owner = Uuid::from_u128(7);
        let id = message_id(owner, 3, 65_537);
        assert_eq!(parse_message_id(&id), Some((owner, 3, 65_537)));
        for bad in ["", "msg_", "msg_7_3_1", &format!("{id}_1"), &id[4..], &id.replace("_3_", "_x_")] {
            assert_eq!(parse_message_id(bad), None, "{bad}");
        }
    }

    #[test]
    fn patterns_name_all_their_events() {
        let of = |text: &str| events_of(&[text.to_owned()], "/types").unwrap();
        assert_eq!(of("job.completed"), [2]);
        assert!(of("job.*").len() >= 8 && of("*").len() == EventType::ALL.len());
        assert_eq!(events_of(&["nope".to_owned()], "/types").unwrap_err().fields[0].0, "/types/0");
    }
}
