//! What is fuzzed: each function takes any bytes and panics where a promise is broken.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Component, Path};
use std::sync::{Arc, Once};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use hmac::{Hmac, KeyInit as _, Mac as _};
use http::{HeaderMap, HeaderName, HeaderValue};
use ringback_domain::artifact::{SafeName, file_name, url_segment};
use ringback_inference::{
    Batch, CpuEngine, CpuOptions, EncodeInput, Engine, EngineError, Model, OpenOptions, Outputs, Task,
};
use ringback_webhook_receiver::{Event, Proof, Secrets, Trust};
use sha2::Sha256;

/// The secret, and the moment, of the test vector that Standard Webhooks publishes.
const SECRET: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";
const NOW_S: i64 = 1_614_265_330;
const RAW_SECRET: &str = "any text, however it looks";

fn mac(key: &[u8], parts: &[&[u8]]) -> Vec<u8> {
    let mut mac = Hmac::<Sha256>::new_from_slice(key).expect("HMAC takes keys of any length");
    for part in parts {
        mac.update(part);
    }
    mac.finalize().into_bytes().to_vec()
}

/// The keys of Standard Webhooks, worked out a second time.
fn keys() -> [Vec<u8>; 2] {
    [
        STANDARD.decode(&SECRET["whsec_".len()..]).expect("the published secret is base64"),
        RAW_SECRET.as_bytes().to_vec(),
    ]
}

fn signature(key: &[u8], id: &str, timestamp: &str, body: &[u8]) -> String {
    format!("v1,{}", STANDARD.encode(mac(key, &[id.as_bytes(), b".", timestamp.as_bytes(), b".", body])))
}

/// Lines of `name: value` up to an empty one, then the body.
fn request(data: &[u8]) -> (HeaderMap, &[u8]) {
    let mut headers = HeaderMap::new();
    let mut rest = data;
    while let Some(end) = rest.iter().position(|byte| *byte == b'\n') {
        let (line, after) = (&rest[..end], &rest[end + 1..]);
        rest = after;
        if line.is_empty() {
            break;
        }
        let Some(colon) = line.iter().position(|byte| *byte == b':') else { continue };
        let value = line[colon + 1..].trim_ascii();
        if let (Ok(name), Ok(value)) =
            (HeaderName::from_bytes(&line[..colon]), HeaderValue::from_bytes(value))
        {
            headers.append(name, value);
        }
    }
    (headers, rest)
}

fn text<'a>(headers: &'a HeaderMap, name: &str) -> &'a str {
    headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default()
}

/// Nothing is trusted without a signature that fits, and what is signed well is trusted.
pub(crate) fn signature_headers(data: &[u8]) {
    let (headers, body) = request(data);
    let trust = Trust::signed(Secrets::parse(&[SECRET, RAW_SECRET]).expect("both secrets are well formed"));
    match trust.verify(&headers, body, None, NOW_S) {
        Ok(Proof::Standard { id, timestamp_s }) => {
            let family = if headers.contains_key("webhook-id") { "webhook" } else { "svix" };
            let get = |part: &str| text(&headers, &format!("{family}-{part}"));
            assert_eq!((get("id"), get("timestamp").parse()), (id.as_str(), Ok(timestamp_s)));
            assert!((NOW_S - timestamp_s).abs() <= 300, "a timestamp of {timestamp_s}");
            let fits =
                |item: &str| keys().iter().any(|key| item == signature(key, &id, get("timestamp"), body));
            assert!(get("signature").split(' ').any(fits), "no signature fits: {headers:?}");
        }
        Ok(Proof::Runflow) => {
            let given = text(&headers, "runflow-signature");
            let fits = [SECRET, RAW_SECRET].iter().any(|secret| {
                let hex: String =
                    mac(secret.as_bytes(), &[body]).iter().map(|b| format!("{b:02x}")).collect();
                hex == given
            });
            assert!(fits, "Runflow-Signature does not fit: {headers:?}");
        }
        Ok(Proof::Unsigned { .. }) => panic!("nobody may send unsigned requests: {headers:?}"),
        Err(refusal) => assert!(!refusal.code().is_empty() && !refusal.to_string().contains(&SECRET[6..])),
    }
    well_signed(&trust, &headers, body);
}

/// The same id, time and body, signed: trusted, unless the id or the time cannot be; never with another body.
fn well_signed(trust: &Trust, headers: &HeaderMap, body: &[u8]) {
    let (id, timestamp) = (text(headers, "webhook-id"), text(headers, "webhook-timestamp"));
    let sound = !id.is_empty()
        && id.len() <= 256
        && timestamp.parse::<i64>().is_ok_and(|at| at.abs_diff(NOW_S) <= 300);
    for key in keys() {
        let mut signed = HeaderMap::new();
        for name in ["webhook-id", "webhook-timestamp"] {
            if let Some(value) = headers.get(name) {
                signed.insert(HeaderName::from_static(name), value.clone());
            }
        }
        let list = format!("v1a,AAAA v1,AAAA {}", signature(&key, id, timestamp, body));
        signed.insert("webhook-signature", list.parse().expect("base64 and commas may stand in a header"));
        let judged = trust.verify(&signed, body, None, NOW_S);
        assert_eq!(judged.is_ok(), sound, "{judged:?} for {signed:?}");
        let other = [body, b" "].concat();
        assert!(trust.verify(&signed, &other, None, NOW_S).is_err(), "another body under {signed:?}");
    }
}

/// A body is read as an event or refused with a reason; what is read says the same each time.
pub(crate) fn callback_bodies(data: &[u8]) {
    let event = match Event::parse(data) {
        Ok(event) => event,
        Err(error) => {
            assert!(!error.to_string().is_empty());
            return;
        }
    };
    assert!(serde_json::from_slice::<serde::de::IgnoredAny>(data).is_ok(), "an event that is no JSON");
    let again = Event::parse(data).expect("the same bytes were an event a moment ago");
    assert_eq!(
        (event.kind(), event.own_key(), event.subject(), event.ended_job()),
        (again.kind(), again.own_key(), again.subject(), again.ended_job())
    );
    assert!(!event.kind().is_empty() && !event.own_key().is_empty());
    assert_eq!(event.payload_keys(), again.payload_keys());
    match &event {
        Event::Runpod(job) => {
            let _ = job.audio_base64();
        }
        Event::Runflow(callback) => {
            for link in callback.links(50).unwrap_or_default() {
                assert!(link.starts_with("https://") || link.starts_with("http://"), "{link:?}");
            }
        }
        Event::Artifact(notice) => safe(SafeName::from_untrusted(&notice.filename).as_str()),
        Event::Standard(_) | Event::Batch(_) => {}
    }
}

fn safe(name: &str) {
    let mut parts = Path::new(name).components();
    assert!(matches!(parts.next(), Some(Component::Normal(part)) if part == name), "{name:?}");
    assert!(parts.next().is_none(), "{name:?} has more than one part");
    assert!(!name.starts_with('.') && !name.contains(['/', '\\', '\0']), "{name:?}");
}

/// Whatever a sender or a handler calls a file: it stays in its folder, of bounded length, and safe when named again.
pub(crate) fn file_names(data: &[u8]) {
    let given = String::from_utf8_lossy(data);
    let name = SafeName::from_untrusted(&given);
    safe(name.as_str());
    assert!(name.as_str().len() <= 200, "{name}");
    assert_eq!(SafeName::from_untrusted(name.as_str()), name, "of {given:?}");
    assert_eq!(SafeName::exactly(name.as_str()).as_ref(), Some(&name));
    let numbered = name.numbered(u32::MAX);
    safe(numbered.as_str());
    assert_eq!(SafeName::exactly(numbered.as_str()).as_ref(), Some(&numbered), "of {given:?}");
    if let Some(exact) = SafeName::exactly(&given) {
        safe(exact.as_str());
    }

    let kept = file_name(&given);
    safe(&kept);
    assert!(kept.len() <= 200 && !kept.contains(|c: char| c.is_control() || c == '"'), "{kept:?}");
    let segment = url_segment(&kept);
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.~%".contains(&byte);
    assert!(segment.bytes().all(plain) && segment != "confirm", "{segment:?}");
    assert!(segment != "." && segment != "..", "{segment:?}");
}

/// The files of a small model that is whole. What the bytes name stands in their place.
const MODEL: [(&str, &[u8]); 3] = [
    ("config.json", include_bytes!("models/tiny/config.json")),
    ("model.safetensors", WEIGHTS),
    ("tokenizer.json", include_bytes!("models/tiny/tokenizer.json")),
];
const WEIGHTS: &[u8] = include_bytes!("models/tiny/model.safetensors");
/// Files that a folder may have beside them.
const MORE: [&str; 4] =
    ["modules.json", "1_Pooling/config.json", "sentence_bert_config.json", "tokenizer_config.json"];
/// A folder of some kilobytes must not take more memory than this.
const MOST_BYTES: u64 = 256 << 20;

/// A folder, and what stands in it.
type Laid = (tempfile::TempDir, BTreeMap<&'static str, Vec<u8>>);

thread_local! {
    /// The folder of this thread.
    static FOLDER: RefCell<Option<Laid>> = const { RefCell::new(None) };
    static QUIET: Cell<bool> = const { Cell::new(false) };
}

/// Sections of `--- NAME`, a line each, and the content of that file.
fn sections(data: &[u8]) -> BTreeMap<&[u8], Vec<u8>> {
    let mut files: BTreeMap<&[u8], Vec<u8>> = BTreeMap::new();
    let mut name: &[u8] = b"";
    for line in data.split(|byte| *byte == b'\n') {
        if let Some(begun) = line.strip_prefix(b"--- ") {
            name = begun;
            files.insert(name, Vec::new());
        } else if let Some(content) = files.get_mut(name) {
            if !content.is_empty() {
                content.push(b'\n');
            }
            content.extend_from_slice(line);
        }
    }
    // `header.json` is model.safetensors with a length that fits and the weights of the whole model.
    if let Some(header) = files.remove(&b"header.json"[..]) {
        let own = 8 + usize::try_from(u64::from_le_bytes(WEIGHTS[..8].try_into().expect("8 bytes")))
            .expect("small");
        let length = u64::try_from(header.len()).expect("small");
        files.insert(
            b"model.safetensors",
            [&length.to_le_bytes(), header.as_slice(), &WEIGHTS[own..]].concat(),
        );
    }
    files
}

/// Runs what may panic and be caught, without a report of the panic, which would end a run of libFuzzer.
fn quietly<T>(work: impl FnOnce() -> T) -> T {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let loud = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            if !QUIET.get() {
                loud(panic);
            }
        }));
    });
    QUIET.set(true);
    let done = catch_unwind(AssertUnwindSafe(work));
    QUIET.set(false);
    done.unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
        panic!("it panics: {}", text.unwrap_or_default())
    })
}

/// The most memory that this process ever had, touched or not. 0 where the system does not tell.
fn peak_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmPeak:"));
    let number = line.and_then(|line| line.trim().strip_suffix(" kB")?.parse::<u64>().ok());
    number.unwrap_or(0) * 1024
}

/// A folder is a model or refused with the file that is wrong, and costs no more than its size; what is a model makes
/// tokens that fit it and computes.
pub(crate) fn model_folders(data: &[u8]) {
    let files = sections(data);
    let task = match files.get(&b"task"[..]).map(Vec::as_slice) {
        Some(b"embed") => Task::Embed,
        Some(b"rerank") => Task::Rerank,
        _ => Task::Classify,
    };
    FOLDER.with_borrow_mut(|folder| {
        let (folder, written) = folder.get_or_insert_with(|| {
            let memory = Path::new("/dev/shm");
            let folder = if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() };
            let folder = folder.expect("a folder");
            std::fs::create_dir(folder.path().join("1_Pooling")).expect("a folder");
            (folder, BTreeMap::new())
        });
        let whole = MODEL.map(|(name, content)| (name, Some(content)));
        for (name, content) in whole.into_iter().chain(MORE.map(|name| (name, None))) {
            let path = folder.path().join(name);
            let content = files.get(name.as_bytes()).map(Vec::as_slice).or(content);
            if written.get(name).map(Vec::as_slice) == content {
                continue;
            }
            match content {
                Some(content) => {
                    std::fs::write(path, content).expect("a file");
                    written.insert(name, content.to_vec());
                }
                None => {
                    std::fs::remove_file(path).expect("it was written");
                    written.remove(name);
                }
            }
        }
        let before = peak_bytes();
        match quietly(|| Model::open(folder.path(), task, OpenOptions::default())) {
            Ok(model) => computes(&model, task),
            Err(error) => {
                let (text, folder) = (error.to_string(), folder.path().display().to_string());
                assert!(text.contains(&folder), "no file is named: {text}");
            }
        }
        let taken = peak_bytes().saturating_sub(before);
        assert!(taken < MOST_BYTES, "{taken} bytes of memory for a folder of {} bytes", data.len());
    });
}

fn computes(model: &Model, task: Task) {
    let (encoder, text) = (model.encoder(), |text: &str| EncodeInput::Text(text.to_owned()));
    let config = &encoder.config;
    assert_eq!(config.head_size() * config.num_attention_heads, config.hidden_size);
    let inputs = match task {
        Task::Rerank => vec![EncodeInput::Pair("a dog".to_owned(), "the cats, \u{1F600}".repeat(9))],
        Task::Embed | Task::Classify => {
            vec![text(""), text("a dog, the cats"), text(&"x y \u{5929}".repeat(30))]
        }
    };
    let mut batch = Batch::new();
    for input in inputs {
        // Refused, with a reason.
        let Ok(tokens) = quietly(|| model.tokenizer().encode(&input)) else { continue };
        assert!((1..=encoder.max_seq_len).contains(&tokens.ids.len()), "{} tokens", tokens.ids.len());
        batch.push(&tokens.ids, &tokens.type_ids, config.position_offset);
    }
    let options = CpuOptions { threads: 1, ..CpuOptions::default() };
    let options =
        CpuOptions { max_batch_tokens: options.max_batch_tokens.max(3 * encoder.max_seq_len), ..options };
    let mut engine =
        CpuEngine::new(Arc::clone(encoder), options).expect("an engine of a model that fits together");
    let mut outputs = Outputs::default();
    if batch.sequences() == 0 {
        return;
    }
    engine.submit(&batch).expect("tokens that fit the model");
    match engine.collect(&mut outputs) {
        Ok(()) => {
            assert_eq!((outputs.width, outputs.rows().len()), (encoder.output_width(), batch.sequences()))
        }
        Err(EngineError::NotFinite { .. }) => {}
        Err(error) => panic!("{error}"),
    }
    if task == Task::Classify {
        assert_eq!(model.labels().len(), encoder.output_width());
    }
}
