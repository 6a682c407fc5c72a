//! Cheap checks on JSON bytes before they are parsed or stored verbatim.

/// Why bytes or text from outside were refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum JsonError {
    /// More levels of objects and lists than allowed.
    #[error("is nested deeper than {max} levels")]
    TooDeep {
        /// The limit.
        max: u32,
    },
    /// A NUL character where SQL text cannot hold one.
    #[error("contains a NUL character (\\u0000), which cannot be stored in this field")]
    Nul,
    /// Longer than the field may be.
    #[error("is {len} bytes long, at most {max} are allowed")]
    TooLong {
        /// Length found, in bytes.
        len: usize,
        /// The limit, in bytes.
        max: usize,
    },
}

/// Refuses JSON that nests deeper than `max` levels. One pass, no recursion, no allocation; it does not check
/// that the bytes are valid JSON (malformed bytes are for the parser to refuse).
///
/// # Errors
/// [`JsonError::TooDeep`].
pub fn check_depth(bytes: &[u8], max: u32) -> Result<(), JsonError> {
    let (mut depth, mut in_string, mut escaped) = (0u32, false, false);
    for &byte in bytes {
        if in_string {
            match byte {
                _ if escaped => escaped = false,
                b'\\' => escaped = true,
                b'"' => in_string = false,
                _ => {}
            }
            continue;
        }
        match byte {
            b'"' => in_string = true,
            b'{' | b'[' => {
                depth += 1;
                if depth > max {
                    return Err(JsonError::TooDeep { max });
                }
            }
            b'}' | b']' => depth = depth.saturating_sub(1),
            _ => {}
        }
    }
    Ok(())
}

/// Checks text that becomes an SQL text column (idempotency key, client reference, URL, error message).
///
/// The NUL rule: `input`, `output` and chunks are stored as bytes, so an escaped `\u0000` inside them is kept
/// untouched. Only fields stored as SQL text refuse it, because PostgreSQL's text type cannot hold it.
///
/// # Errors
/// [`JsonError::Nul`] or [`JsonError::TooLong`].
pub fn check_text(text: &str, max_bytes: usize) -> Result<(), JsonError> {
    if text.len() > max_bytes {
        return Err(JsonError::TooLong { len: text.len(), max: max_bytes });
    }
    if text.contains('\0') { Err(JsonError::Nul) } else { Ok(()) }
}

/// Text made by others (a handler's error, a log line) fit for an SQL text column: NULs become U+FFFD, and what
/// exceeds `max_bytes` is cut at a character boundary.
#[must_use]
pub fn fit_text(text: &str, max_bytes: usize) -> String {
    let mut out = text.replace('\0', "\u{fffd}");
    if out.len() > max_bytes {
        let cut = (0..=max_bytes).rev().find(|&n| out.is_char_boundary(n)).unwrap_or(0);
        out.truncate(cut);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::Value;

    #[test]
    fn depth_is_counted_outside_of_strings_only() {
        assert_eq!(check_depth(br#"{"a":[1,{"b":2}]}"#, 3), Ok(()));
        assert_eq!(check_depth(br#"{"a":[1,{"b":2}]}"#, 2), Err(JsonError::TooDeep { max: 2 }));
        assert_eq!(check_depth(br#"["[[[[\"[[[","{{{\\"]"#, 1), Ok(()));
        assert_eq!(check_depth("[".repeat(1_000_000).as_bytes(), 128), Err(JsonError::TooDeep { max: 128 }));
        assert_eq!(check_depth("[]".repeat(1_000_000).as_bytes(), 1), Ok(()));
    }

    #[test]
    fn text_rules() {
        assert_eq!(check_text("héllo", 6), Ok(()));
        assert_eq!(check_text("héllo", 5), Err(JsonError::TooLong { len: 6, max: 5 }));
        assert_eq!(check_text("a\0b", 10), Err(JsonError::Nul));
        assert_eq!(fit_text("a\0é", 4), "a\u{fffd}");
        assert_eq!(fit_text("aé", 2), "a");
    }

    fn json() -> impl Strategy<Value = Value> {
        let leaf =
            prop_oneof![Just(Value::Null), any::<i32>().prop_map(Value::from), ".*".prop_map(Value::from)];
        leaf.prop_recursive(6, 64, 4, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                prop::collection::hash_map(".*", inner, 0..4).prop_map(Value::from_iter),
            ]
        })
    }

    fn depth_of(value: &Value) -> u32 {
        match value {
            Value::Array(items) => 1 + items.iter().map(depth_of).max().unwrap_or(0),
            Value::Object(map) => 1 + map.values().map(depth_of).max().unwrap_or(0),
            _ => 0,
        }
    }

    proptest! {
        #[test]
        fn agrees_with_the_parsed_value(value in json()) {
            let depth = depth_of(&value);
            let bytes = serde_json::to_vec(&value).unwrap();
            prop_assert_eq!(check_depth(&bytes, depth), Ok(()));
            if depth > 0 {
                prop_assert_eq!(check_depth(&bytes, depth - 1), Err(JsonError::TooDeep { max: depth - 1 }));
            }
        }
    }
}
