//! What an output says of a completion: OpenAI's shape, what vLLM's worker for RunPod makes of it, or a plain text.
//!
//! Tolerant: whatever is not understood is absent.

use serde_json::Value;

/// What is known of a completion's end.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Completion {
    /// The model that answered.
    pub model: Option<String>,
    /// The text.
    pub content: Option<String>,
    /// Whether the text goes on.
    pub content_cut: bool,
    /// Why it ended.
    pub finish_reason: Option<String>,
    /// Tokens read.
    pub prompt_tokens: Option<u64>,
    /// Tokens written.
    pub completion_tokens: Option<u64>,
    /// Their sum, as told or added up.
    pub total_tokens: Option<u64>,
}

/// Longest output that is looked into.
const MAX_BYTES: usize = 1024 * 1024;
/// Longest output that [`Completion::of_large`] looks into: what is parsed takes a few times as much memory.
const LARGE_MAX_BYTES: usize = 32 * 1024 * 1024;
/// The text that [`Completion::of_large`] keeps: it travels with the outcome and goes into bodies.
pub const LARGE_CONTENT_MAX_BYTES: usize = 128 * 1024;

impl Completion {
    /// Reads an output.
    #[must_use]
    pub fn read(output: &[u8]) -> Self {
        Self::read_up_to(output, MAX_BYTES)
    }

    /// Reads an output that is too large to be read again, and keeps no more of it than can be handed on. None where it
    /// says nothing of a completion.
    #[must_use]
    pub fn of_large(output: &[u8]) -> Option<Self> {
        let mut found = Self::read_up_to(output, LARGE_MAX_BYTES);
        if found == Self::default() {
            return None;
        }
        if let Some(content) = found.content.as_mut().filter(|text| text.len() > LARGE_CONTENT_MAX_BYTES) {
            content.truncate(content.floor_char_boundary(LARGE_CONTENT_MAX_BYTES));
            content.shrink_to_fit();
            found.content_cut = true;
        }
        for text in [&mut found.model, &mut found.finish_reason] {
            *text = text.take().filter(|text| text.len() <= super::MAX_TEXT_BYTES);
        }
        Some(found)
    }

    fn read_up_to(output: &[u8], max_bytes: usize) -> Self {
        let mut found = Self::default();
        if output.len() <= max_bytes
            && let Ok(value) = serde_json::from_slice::<Value>(output)
        {
            found.take(&value, true);
        }
        if found.total_tokens.is_none() {
            found.total_tokens = match (found.prompt_tokens, found.completion_tokens) {
                (None, None) => None,
                (a, b) => Some(a.unwrap_or(0).saturating_add(b.unwrap_or(0))),
            };
        }
        found
    }

    /// The text of one streamed piece.
    #[must_use]
    pub fn piece(chunk: &[u8]) -> Option<String> {
        Self::read(chunk).content
    }

    fn take(&mut self, value: &Value, outermost: bool) {
        match value {
            Value::String(text) => self.take_text(text),
            // Pieces of a stream, collected: their texts follow each other, of the rest the last word counts.
            Value::Array(pieces) => pieces.iter().for_each(|piece| self.take(piece, false)),
            Value::Object(object) => {
                self.take_numbers(object.get("usage").unwrap_or(value));
                self.set(|f| &mut f.model, object.get("model"));
                self.set(|f| &mut f.finish_reason, object.get("finish_reason"));
                if let Some(Value::Array(choices)) = object.get("choices") {
                    if let Some(choice) = choices.first() {
                        self.take_choice(choice);
                    }
                    return;
                }
                let said = ["content", "text", "generated_text", "response", "completion", "message"]
                    .into_iter()
                    .find_map(|key| object.get(key));
                match (said, object.get("output")) {
                    (Some(text), _) => self.take_content(text),
                    (None, Some(inner)) if outermost => self.take(inner, false),
                    (None, _) => {}
                }
            }
            Value::Null | Value::Bool(_) | Value::Number(_) => {}
        }
    }

    fn take_choice(&mut self, choice: &Value) {
        self.set(|f| &mut f.finish_reason, choice.get("finish_reason"));
        let said = ["message", "delta", "text", "tokens"].into_iter().find_map(|key| choice.get(key));
        if let Some(said) = said {
            self.take_content(said);
        }
    }

    /// A text, `{content}`, a list of texts, or a list of parts `{type: "text", text}`.
    fn take_content(&mut self, said: &Value) {
        match said {
            Value::String(text) => self.append(text),
            Value::Array(parts) => parts.iter().for_each(|part| match part {
                Value::String(text) => self.append(text),
                part => {
                    if let Some(Value::String(text)) = part.get("text") {
                        self.append(text);
                    }
                }
            }),
            Value::Object(object) => {
                if let Some(content @ (Value::String(_) | Value::Array(_))) = object.get("content") {
                    self.take_content(content);
                }
            }
            Value::Null | Value::Bool(_) | Value::Number(_) => {}
        }
    }

    /// A text is the content, unless it is a line of a server-sent stream.
    fn take_text(&mut self, text: &str) {
        if !text.starts_with("data:") {
            self.append(text);
            return;
        }
        for line in text.lines().filter_map(|line| line.strip_prefix("data:")) {
            if let Ok(value) = serde_json::from_str::<Value>(line.trim())
                && value.is_object()
            {
                self.take(&value, false);
            }
        }
    }

    fn take_numbers(&mut self, usage: &Value) {
        let number = |keys: &[&str]| keys.iter().find_map(|key| usage.get(key).and_then(Value::as_u64));
        if let Some(n) = number(&["prompt_tokens", "input_tokens", "input"]) {
            self.prompt_tokens = Some(n);
        }
        if let Some(n) = number(&["completion_tokens", "output_tokens", "output"]) {
            self.completion_tokens = Some(n);
        }
        if let Some(n) = number(&["total_tokens"]) {
            self.total_tokens = Some(n);
        }
    }

    fn set(&mut self, field: impl Fn(&mut Self) -> &mut Option<String>, value: Option<&Value>) {
        if let Some(Value::String(text)) = value {
            *field(self) = Some(text.clone());
        }
    }

    fn append(&mut self, text: &str) {
        self.content.get_or_insert_with(String::new).push_str(text);
    }
}

/// `request_id` of an input or of metadata: a text, or a number as text.
#[must_use]
pub fn request_id_of(object: &[u8]) -> Option<String> {
    #[derive(serde::Deserialize)]
    struct Probe<'a> {
        #[serde(borrow, default)]
        request_id: Option<&'a serde_json::value::RawValue>,
    }
    if !object.trim_ascii_start().starts_with(b"{") {
        return None;
    }
    let probe: Probe<'_> = serde_json::from_slice(object).ok()?;
    let id = match serde_json::from_str(probe.request_id?.get()).ok()? {
        Value::String(text) => text,
        Value::Number(number) => number.to_string(),
        Value::Null | Value::Bool(_) | Value::Array(_) | Value::Object(_) => return None,
    };
    (!id.is_empty() && id.len() <= super::MAX_TEXT_BYTES).then_some(id)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn read(value: &Value) -> (Option<String>, Option<String>, [Option<u64>; 3]) {
        let c = Completion::read(value.to_string().as_bytes());
        (c.content, c.finish_reason, [c.prompt_tokens, c.completion_tokens, c.total_tokens])
    }

    fn said(
        text: &str,
        reason: &str,
        tokens: [u64; 3],
    ) -> (Option<String>, Option<String>, [Option<u64>; 3]) {
        (Some(text.into()), Some(reason.into()), tokens.map(Some))
    }

    #[test]
    fn the_shapes_that_servers_give_are_understood() {
        let usage = json!({"prompt_tokens": 9, "completion_tokens": 12, "total_tokens": 21});
        let chat = json!({"id": "x", "model": "m", "choices": [{"message": {"role": "assistant", "content": "Hi"},
            "finish_reason": "stop"}], "usage": usage});
        assert_eq!(read(&chat), said("Hi", "stop", [9, 12, 21]));
        assert_eq!(Completion::read(chat.to_string().as_bytes()).model.as_deref(), Some("m"));
        let text = json!({"choices": [{"text": "Hi", "finish_reason": "length"}], "usage": usage});
        assert_eq!(read(&text), said("Hi", "length", [9, 12, 21]));
        let parts = json!({"choices": [{"message": {"content": [{"type": "text", "text": "H"}, {"text": "i"}]},
            "finish_reason": "stop"}], "usage": {"input_tokens": 1, "output_tokens": 2}});
        assert_eq!(read(&parts), said("Hi", "stop", [1, 2, 3]));
        let vllm = json!([{"choices": [{"tokens": ["H"]}], "usage": {"input": 1, "output": 1}},
            {"choices": [{"tokens": ["i"], "finish_reason": "stop"}], "usage": {"input": 1, "output": 2}}]);
        assert_eq!(read(&vllm), said("Hi", "stop", [1, 2, 3]));
        let streamed = json!([
            "data: {\"choices\":[{\"delta\":{\"role\":\"assistant\"}}]}\n\n",
            "data: {\"choices\":[{\"delta\":{\"content\":\"H\"}}]}\n\n",
            "data: {\"choices\":[{\"delta\":{\"content\":\"i\"},\"finish_reason\":\"stop\"}]}\n\ndata: [DONE]\n\n"
        ]);
        assert_eq!(read(&streamed), (Some("Hi".into()), Some("stop".into()), [None; 3]));
        let wrapped = json!({"output": {"choices": [{"text": "Hi"}]}});
        assert_eq!(read(&wrapped).0.as_deref(), Some("Hi"));
        for plain in
            [json!("Hi"), json!({"text": "Hi"}), json!({"content": "Hi"}), json!({"generated_text": "Hi"})]
        {
            assert_eq!(read(&plain), (Some("Hi".into()), None, [None; 3]), "{plain}");
        }
        for nothing in [json!(null), json!(3), json!({"a": 1}), json!([]), json!({"choices": []})] {
            assert_eq!(read(&nothing), (None, None, [None; 3]), "{nothing}");
        }
    }

    #[test]
    fn a_large_output_gives_its_numbers_and_the_beginning_of_its_text() {
        let long = "é".repeat(2 * LARGE_CONTENT_MAX_BYTES);
        let chat = json!({"model": "m", "choices": [{"message": {"content": long}, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 9, "completion_tokens": 12}});
        let found = Completion::of_large(chat.to_string().as_bytes()).unwrap();
        assert_eq!((found.total_tokens, found.finish_reason.as_deref()), (Some(21), Some("stop")));
        let content = found.content.unwrap();
        assert!(found.content_cut && long.starts_with(&content));
        assert_eq!(content.len(), LARGE_CONTENT_MAX_BYTES);
        assert_eq!(Completion::of_large(b"{\"image\": [1, 2]}"), None);
        let short = Completion::of_large(b"{\"text\": \"Hi\"}").unwrap();
        assert_eq!((short.content.as_deref(), short.content_cut), (Some("Hi"), false));
    }

    #[test]
    fn request_ids_are_texts_or_numbers() {
        let id = |json: &str| request_id_of(json.as_bytes());
        assert_eq!(id(r#"{"a":{"request_id":"no"},"request_id":"r-1"}"#).as_deref(), Some("r-1"));
        assert_eq!(id(r#" {"request_id":17}"#).as_deref(), Some("17"));
        for none in
            [r#"{"request_id":null}"#, r#"{"request_id":""}"#, r#"{"request_id":[1]}"#, "{}", "[]", "1", ""]
        {
            assert_eq!(id(none), None, "{none}");
        }
        assert_eq!(id(&format!(r#"{{"request_id":"{}"}}"#, "x".repeat(257))), None);
    }

    proptest! {
        #[test]
        fn no_output_makes_it_panic(text in ".{0,80}", key in "(choices|usage|output|content|message)") {
            let _ = Completion::read(text.as_bytes());
            let _ = Completion::read(json!({ key: [text.clone(), {"delta": text}] }).to_string().as_bytes());
        }
    }
}
