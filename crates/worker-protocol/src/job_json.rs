//! The JSON object that a take hands to a handler.

use bytes::{BufMut, Bytes, BytesMut};

/// Builds `{"id":…,"input":<input>,…}`. `input` is copied byte for byte, so that the handler sees exactly
/// what the client sent. `extras` are further keys with ready JSON values; the keys `id` and `input` in
/// them are skipped, because the SDK identifies a job by them.
pub fn job_json<'a>(id: &str, input: &[u8], extras: impl IntoIterator<Item = (&'a str, &'a [u8])>) -> Bytes {
    let mut out = BytesMut::with_capacity(input.len() + id.len() + 64);
    out.put_slice(b"{\"id\":");
    put_string(&mut out, id);
    out.put_slice(b",\"input\":");
    out.put_slice(input);
    for (key, value) in extras {
        if key == "id" || key == "input" {
            continue;
        }
        out.put_u8(b',');
        put_string(&mut out, key);
        out.put_u8(b':');
        out.put_slice(value);
    }
    out.put_u8(b'}');
    out.freeze()
}

/// Appends `text` as a JSON string.
pub(crate) fn put_string(out: &mut BytesMut, text: &str) {
    out.put_slice(serde_json::Value::from(text).to_string().as_bytes());
}

#[cfg(test)]
mod tests {
    use super::job_json;

    #[test]
    fn keeps_the_input_byte_for_byte() {
        let input = br#"{ "n": 1.0, "z" : "\u00e9", "big": 12345678901234567890123 }"#;
        let made = job_json("a\"b", input, [("webhook", b"\"https://x\"".as_slice()), ("input", b"1")]);
        let text = String::from_utf8(made.to_vec()).expect("utf-8");
        assert!(text.contains(std::str::from_utf8(input).expect("utf-8")));
        let value: serde_json::Value = serde_json::from_str(&text).expect("valid JSON");
        assert_eq!(value["id"], "a\"b");
        assert_eq!(value["webhook"], "https://x");
        assert_eq!(value["input"]["n"], 1.0);
    }
}
