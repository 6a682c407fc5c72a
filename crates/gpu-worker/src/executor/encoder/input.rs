//! From a job's input to texts for the encoder: our own shape, OpenAI's, and the words of TEI, Cohere and Jina.

use ringback_inference::{EncodeInput, Task};
use serde::Deserialize;
use serde_json::value::RawValue;

/// What a job asks for.
#[derive(Debug, PartialEq)]
pub(super) struct Request {
    pub(super) inputs: Vec<EncodeInput>,
    /// The field that the inputs came from, for errors that name one of them.
    pub(super) field: &'static str,
    pub(super) shape: Shape,
    pub(super) encoding: Encoding,
    /// Texts beyond the model's length are refused rather than cut.
    pub(super) refuse_long: bool,
    pub(super) options: Options,
}

/// How the answer looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Shape {
    Native,
    OpenAi,
}

/// How vectors are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Encoding {
    Float,
    /// Little-endian fp32 in base64.
    Base64F32,
    /// Little-endian fp16 in base64.
    Base64F16,
}

/// What only some tasks know.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Options {
    /// Best documents only.
    pub(super) top_n: Option<usize>,
    pub(super) return_documents: bool,
    /// Logits instead of scores.
    pub(super) raw_scores: bool,
}

/// What a job is.
#[derive(Debug, PartialEq)]
pub(super) enum Asked {
    Encode(Request),
    /// The list of models.
    Models,
}

/// Why an input cannot be used.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum BadInput {
    /// A field is wrong; the text names it.
    Field(String),
    /// There is no such route on an endpoint of this task.
    Route(String),
}

/// The limits of an endpoint.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    pub(super) task: Task,
    pub(super) width: usize,
    pub(super) max_inputs: usize,
    /// Whether long texts are cut unless the input says otherwise.
    pub(super) truncate: bool,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Fields<'a> {
    #[serde(borrow)]
    openai_route: Option<&'a RawValue>,
    #[serde(borrow)]
    openai_input: Option<&'a RawValue>,
    #[serde(borrow)]
    texts: Option<&'a RawValue>,
    #[serde(borrow)]
    input: Option<&'a RawValue>,
    #[serde(borrow)]
    inputs: Option<&'a RawValue>,
    #[serde(borrow)]
    query: Option<&'a RawValue>,
    #[serde(borrow)]
    documents: Option<&'a RawValue>,
    #[serde(borrow)]
    encoding: Option<&'a RawValue>,
    #[serde(borrow)]
    encoding_format: Option<&'a RawValue>,
    #[serde(borrow)]
    dtype: Option<&'a RawValue>,
    #[serde(borrow)]
    dimensions: Option<&'a RawValue>,
    #[serde(borrow)]
    truncate: Option<&'a RawValue>,
    #[serde(borrow)]
    top_n: Option<&'a RawValue>,
    #[serde(borrow)]
    return_documents: Option<&'a RawValue>,
    #[serde(borrow)]
    raw_scores: Option<&'a RawValue>,
}

fn field(text: impl Into<String>) -> BadInput {
    BadInput::Field(text.into())
}

fn fields<'a>(json: &'a [u8], what: &str) -> Result<Fields<'a>, BadInput> {
    let example = "{\"texts\": [\"…\"]}";
    match json.trim_ascii_start().first() {
        // A list would be taken for the fields in order.
        Some(b'{') => serde_json::from_slice(json).map_err(|e| field(format!("{what} cannot be read: {e}"))),
        _ => Err(field(format!("{what} must be an object such as {example}"))),
    }
}

/// Reads an input.
pub(super) fn read(json: &[u8], limits: Limits) -> Result<Asked, BadInput> {
    let outer = fields(json, "`input`")?;
    let Some(route) = outer.openai_route else {
        return request(&outer, limits, Shape::Native).map(Asked::Encode);
    };
    let route: String = typed("openai_route", route, "a text")?;
    let route = route.strip_prefix("/v1").or_else(|| route.strip_prefix("/v2")).unwrap_or(&route);
    match (route, limits.task) {
        ("/models", _) => return Ok(Asked::Models),
        ("/embeddings", Task::Embed) | ("/rerank", Task::Rerank) | ("/classify", Task::Classify) => {}
        _ => {
            let serves = match limits.task {
                Task::Embed => "/v1/embeddings",
                Task::Rerank => "/v1/rerank",
                Task::Classify => "/v1/classify",
            };
            return Err(BadInput::Route(format!(
                "this endpoint does not serve {route}: its task is {}, which answers {serves} and /v1/models",
                limits.task.name()
            )));
        }
    }
    let body = outer.openai_input.ok_or_else(|| field("the request has no body: send it with POST"))?;
    let inner = fields(body.get().as_bytes(), "the body")?;
    request(&inner, limits, Shape::OpenAi).map(Asked::Encode)
}

fn request(fields: &Fields<'_>, limits: Limits, shape: Shape) -> Result<Request, BadInput> {
    let named = [
        ("texts", fields.texts),
        ("input", fields.input),
        ("inputs", fields.inputs),
        ("documents", fields.documents),
    ];
    let mut given = named.into_iter().filter_map(|(name, raw)| Some((name, raw?)));
    let expected = match limits.task {
        Task::Rerank => "`query` and `documents` (or `texts`)",
        Task::Embed | Task::Classify => "`texts` (or `input`)",
    };
    let (name, raw) = given.next().ok_or_else(|| field(format!("the input lacks {expected}")))?;
    if let Some((other, _)) = given.next() {
        return Err(field(format!("`{name}` and `{other}` name the same thing: send one of them")));
    }
    let texts = texts(name, raw, limits.max_inputs)?;
    let inputs = match (limits.task, fields.query) {
        (Task::Rerank, Some(query)) => {
            let query: String = typed("query", query, "a text")?;
            texts.into_iter().map(|text| EncodeInput::Pair(query.clone(), text)).collect()
        }
        (Task::Rerank, None) => return Err(field(format!("the input lacks {expected}"))),
        (Task::Embed | Task::Classify, _) => texts.into_iter().map(EncodeInput::Text).collect(),
    };
    if let Some(raw) = fields.dimensions.filter(|raw| raw.get() != "null") {
        let found: u64 = typed("dimensions", raw, "a whole number")?;
        if found != limits.width as u64 {
            return Err(field(format!(
                "`dimensions` is {found}, but this model's vectors have {} numbers and cannot be shortened",
                limits.width
            )));
        }
    }
    let truncate = flag("truncate", fields.truncate)?.unwrap_or(limits.truncate);
    let top_n = fields.top_n.filter(|raw| raw.get() != "null");
    let options = Options {
        top_n: top_n.map(|raw| typed("top_n", raw, "a whole number of at least 1")).transpose()?,
        return_documents: flag("return_documents", fields.return_documents)?.unwrap_or(false),
        raw_scores: flag("raw_scores", fields.raw_scores)?.unwrap_or(false),
    };
    if options.top_n == Some(0) {
        return Err(field("`top_n` is 0, it must be at least 1"));
    }
    Ok(Request { inputs, field: name, shape, encoding: encoding(fields)?, refuse_long: !truncate, options })
}

fn encoding(fields: &Fields<'_>) -> Result<Encoding, BadInput> {
    let (name, raw) = match (fields.encoding, fields.encoding_format) {
        (Some(raw), _) => ("encoding", Some(raw)),
        (None, raw) => ("encoding_format", raw),
    };
    let word = |name: &str, raw: Option<&RawValue>, expected: &str| {
        raw.filter(|raw| raw.get() != "null").map(|raw| typed::<String>(name, raw, expected)).transpose()
    };
    let base64 = match word(name, raw, "\"float\" or \"base64\"")?.as_deref() {
        None | Some("float") => false,
        Some("base64") => true,
        Some(other) => {
            return Err(field(format!("`{name}` is {other:?}, it must be \"float\" or \"base64\"")));
        }
    };
    let expected = "\"float32\" or \"float16\"";
    match (word("dtype", fields.dtype, expected)?.as_deref(), base64) {
        (None | Some("float32" | "fp32"), true) => Ok(Encoding::Base64F32),
        (None | Some("float32" | "fp32"), false) => Ok(Encoding::Float),
        (Some("float16" | "fp16"), true) => Ok(Encoding::Base64F16),
        (Some("float16" | "fp16"), false) => {
            Err(field("`dtype` \"float16\" needs `encoding` \"base64\": JSON numbers have no type"))
        }
        (Some(other), _) => Err(field(format!("`dtype` is {other:?}, it must be {expected}"))),
    }
}

fn flag(name: &str, raw: Option<&RawValue>) -> Result<Option<bool>, BadInput> {
    raw.filter(|raw| raw.get() != "null").map(|raw| typed(name, raw, "true or false")).transpose()
}

fn typed<'a, T: Deserialize<'a>>(name: &str, raw: &'a RawValue, expected: &str) -> Result<T, BadInput> {
    serde_json::from_str(raw.get()).map_err(|_| field(format!("`{name}` must be {expected}")))
}

/// A text, or a list of texts; documents may be objects with a `text`.
fn texts(name: &str, raw: &RawValue, max: usize) -> Result<Vec<String>, BadInput> {
    match raw.get().as_bytes().first() {
        Some(b'"') => Ok(vec![typed(name, raw, "a text")?]),
        Some(b'[') => {
            let all: Vec<&RawValue> = typed(name, raw, "a list of texts")?;
            if all.is_empty() {
                return Err(field(format!("`{name}` is empty: send at least one text")));
            }
            if all.len() > max {
                return Err(field(format!(
                    "`{name}` has {} texts, at most {max} are allowed in one job (setting max_inputs)",
                    all.len()
                )));
            }
            all.into_iter().enumerate().map(|(index, raw)| one(name, index, raw)).collect()
        }
        _ => Err(field(format!("`{name}` must be a text or a list of texts"))),
    }
}

fn one(name: &str, index: usize, raw: &RawValue) -> Result<String, BadInput> {
    #[derive(Deserialize)]
    struct Document {
        text: String,
    }
    let text = raw.get();
    let found = match text.as_bytes().first() {
        Some(b'"') => return typed(&format!("{name}[{index}]"), raw, "a text of whole characters"),
        Some(b'{') => {
            return typed::<Document>(
                &format!("{name}[{index}]"),
                raw,
                "a text, or an object with a text `text`",
            )
            .map(|d| d.text);
        }
        // OpenAI's clients may send ids of OpenAI's own tokenizer, which mean nothing to this model.
        Some(b'[') => "a list; token ids of another tokenizer mean nothing to this model",
        Some(b'n') => "null",
        Some(b't' | b'f') => "a boolean",
        _ => "a number",
    };
    Err(field(format!("`{name}[{index}]` is {found}; send texts")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits(task: Task) -> Limits {
        Limits { task, width: 384, max_inputs: 3, truncate: true }
    }

    fn encode(task: Task, json: &str) -> Result<Request, BadInput> {
        match read(json.as_bytes(), limits(task))? {
            Asked::Encode(request) => Ok(request),
            Asked::Models => panic!("models"),
        }
    }

    fn text(text: &str) -> EncodeInput {
        EncodeInput::Text(text.to_owned())
    }

    #[test]
    fn every_shape_of_texts_is_read() {
        for json in [
            r#"{"texts":["a","b"]}"#,
            r#"{"input":["a","b"]}"#,
            r#"{"inputs":["a",{"text":"b"}]}"#,
            r#"{"openai_route":"/v1/embeddings","openai_input":{"model":"m","user":"u","input":["a","b"]}}"#,
        ] {
            assert_eq!(encode(Task::Embed, json).unwrap().inputs, [text("a"), text("b")], "{json}");
        }
        let one = encode(
            Task::Embed,
            r#"{"texts":"\ud83d\ude00","encoding":"base64","dtype":"float16","truncate":false}"#,
        )
        .unwrap();
        assert_eq!(
            (one.inputs, one.encoding, one.refuse_long),
            (vec![text("\u{1F600}")], Encoding::Base64F16, true)
        );
        let pair = EncodeInput::Pair("q".into(), "d".into());
        let rerank =
            encode(Task::Rerank, r#"{"query":"q","documents":["d"],"top_n":1,"return_documents":true}"#)
                .unwrap();
        assert_eq!(rerank.inputs, [pair]);
        assert_eq!(rerank.options, Options { top_n: Some(1), return_documents: true, raw_scores: false });
        let models = read(br#"{"openai_route":"/v1/models"}"#, limits(Task::Embed)).unwrap();
        assert_eq!(models, Asked::Models);
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (task, json, part) in [
            (Task::Embed, "[1]", "`input` must be an object"),
            (Task::Embed, "null", "`input` must be an object"),
            (Task::Embed, "{}", "lacks `texts`"),
            (Task::Embed, r#"{"texts":[]}"#, "`texts` is empty"),
            (Task::Embed, r#"{"texts":5}"#, "`texts` must be a text or a list"),
            (Task::Embed, r#"{"texts":["a",7]}"#, "`texts[1]` is a number"),
            (Task::Embed, r#"{"texts":["a",null]}"#, "`texts[1]` is null"),
            (Task::Embed, r#"{"texts":["\ud800"]}"#, "`texts[0]` must be a text of whole characters"),
            (Task::Embed, r#"{"input":[[1,2]]}"#, "`input[0]` is a list; token ids"),
            (Task::Embed, r#"{"input":[1,2]}"#, "`input[0]` is a number"),
            (Task::Embed, r#"{"texts":["a","b","c","d"]}"#, "has 4 texts, at most 3"),
            (Task::Embed, r#"{"texts":["a"],"input":"b"}"#, "`texts` and `input`"),
            (Task::Embed, r#"{"texts":["a"],"dimensions":256}"#, "`dimensions` is 256"),
            (Task::Embed, r#"{"texts":["a"],"encoding_format":"hex"}"#, "`encoding_format` is \"hex\""),
            (Task::Embed, r#"{"texts":["a"],"dtype":"float16"}"#, "needs `encoding` \"base64\""),
            (Task::Embed, r#"{"texts":["a"],"truncate":"yes"}"#, "`truncate` must be true or false"),
            (Task::Rerank, r#"{"documents":["a"]}"#, "lacks `query`"),
            (Task::Rerank, r#"{"query":["q"],"documents":["a"]}"#, "`query` must be a text"),
            (
                Task::Rerank,
                r#"{"query":"q","documents":[{"title":"a"}]}"#,
                "`documents[0]` must be a text, or an object",
            ),
            (Task::Rerank, r#"{"query":"q","texts":["a"],"top_n":0}"#, "`top_n` is 0"),
        ] {
            match encode(task, json) {
                Err(BadInput::Field(text)) => assert!(text.contains(part), "{json}: {text}"),
                other => panic!("{json}: {other:?}"),
            }
        }
        let wrong = encode(Task::Embed, r#"{"openai_route":"/v1/chat/completions","openai_input":{}}"#);
        assert!(matches!(wrong, Err(BadInput::Route(text)) if text.contains("/v1/embeddings")));
    }
}
