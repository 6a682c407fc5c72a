use super::*;
use serde_json::json;

fn problems(toml: &str) -> Vec<(String, String)> {
    match RingbackConfig::from_toml(toml) {
        Err(ConfigError::Invalid(problems)) => {
            problems.list().iter().map(|p| (p.key.clone(), p.detail.clone())).collect()
        }
        Err(other) => panic!("expected problems, got {other}"),
        Ok(_) => panic!("expected problems in {toml}"),
    }
}

fn keys(toml: &str) -> Vec<String> {
    problems(toml).into_iter().map(|(key, _)| key).collect()
}

#[test]
fn an_empty_file_is_valid_and_equals_the_defaults() {
    let config = RingbackConfig::from_toml("").unwrap();
    assert_eq!(
        serde_json::to_value(&config).unwrap(),
        serde_json::to_value(RingbackConfig::default()).unwrap()
    );
    assert_eq!(config.server.listen.port(), 8080);
    assert_eq!(config.worker.lease_ms, 30_000);
}

#[test]
fn a_full_file_is_read() {
    let config = RingbackConfig::from_toml(
        r#"
        [server]
        listen = "127.0.0.1:9000"
        public_url = "https://jobs.example/"
        [projects.default]
        api_keys = [{ name = "app", key = "0123456789abcdef", scopes = ["submit", "admin"] }]
        webhook_secrets = [{ secret = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw" }]
        [[endpoints]]
        name = "tts"
        alias = "acme/tts"
        executor = { process = { command = "python3 handler.py", env = { A = "1" }, grace_ms = 100 } }
        retention = { preset = "runpod", failed_ms = 86400000 }
        webhook_events = "all"
        [[endpoints]]
        name = "echo"
        executor = { builtin = "echo" }
        slots = 8
        [[batch_templates]]
        preset = "tts"
        endpoint = "tts"
        [webhooks]
        profile = "runpod-strict"
        allow_private = ["10.0.0.0/8"]
        "#,
    )
    .unwrap();
    assert_eq!(config.server.base_url(config.server.listen), "https://jobs.example");
    let tts = &config.endpoints[0];
    let Some(ExecutorConfig::Process(process)) = &tts.executor else { panic!("not a process") };
    assert_eq!(process.command.argv(), ["/bin/sh", "-c", "python3 handler.py"]);
    let kept = tts.retention.resolve();
    assert_eq!((kept.completed_ms, kept.failed_ms, kept.sync_ms), (1_800_000, 86_400_000, 60_000));
    assert!(matches!(config.endpoints[1].executor, Some(ExecutorConfig::Builtin(Builtin::Echo))));
    let key = &config.projects["default"].api_keys[0];
    assert_eq!(key.resolve_sha256("k").unwrap().to_vec(), sha("0123456789abcdef"));
}

fn sha(text: &str) -> Vec<u8> {
    use sha2::Digest;
    sha2::Sha256::digest(text.as_bytes()).to_vec()
}

#[test]
fn unknown_keys_and_wrong_types_name_the_line_and_hide_the_value() {
    let unknown = RingbackConfig::from_toml("[server]\nlisten_on = \"x\"\n").unwrap_err().to_string();
    assert!(unknown.starts_with("line 2: unknown field `listen_on`"), "{unknown}");
    let text =
        "[projects.default]\napi_keys = [{ name = \"a\", key_sha256 = \"x\", scopes = \"canary-5f1c\" }]\n";
    let wrong = RingbackConfig::from_toml(text).unwrap_err().to_string();
    assert!(wrong.starts_with("line 2: wrong type"), "{wrong}");
    assert!(!wrong.contains("canary"), "{wrong}");
}

#[test]
fn contradictions_name_their_keys() {
    for (toml, key) in [
        ("[server]\npublic_url = \"ftp://x\"", "server.public_url"),
        ("[server]\nmax_json_depth = 1000", "server.max_json_depth"),
        ("[nats]\ninstall = \"a.b\"", "nats.install"),
        ("[nats]\nurl = \"http://x\"", "nats.url"),
        ("[nats]\nurl = \"nats://u:secret@x\"", "nats.url"),
        ("[nats]\nreplicas = 2", "nats.replicas"),
        ("[nats]\nuser = \"u\"", "nats.password"),
        ("[database]\nurl = \"mysql://x\"", "database.url"),
        ("[database]\nurl = \"sqlite:x\"\nurl_env = \"X\"", "database"),
        ("[blobs]\nurl = \"s3://bucket\"", "blobs.url"),
        ("[worker]\nheartbeat_ms = 20000", "worker.lease_ms"),
        ("[worker]\ndevice = \"gpu\"", "worker.device"),
        ("[webhooks]\nallow_private = [\"10.0.0.0\"]", "webhooks.allow_private[0]"),
        ("[telemetry]\nsampling_ratio = 2.0", "telemetry.sampling_ratio"),
        ("[telemetry]\nlog_level = \"a=b=c=d\"", "telemetry.log_level"),
        ("[projects.\"a b\"]", "projects.a b"),
        ("[projects.default]\napi_keys = [{ name = \"a\" }]", "projects.default.api_keys[0]"),
        (
            "[projects.default]\napi_keys = [{ name = \"a\", key = \"short\" }]",
            "projects.default.api_keys[0].key",
        ),
        ("[projects.default]\nwebhook_secrets = [{}]", "projects.default.webhook_secrets[0]"),
        ("[[endpoints]]\nexecutor = { builtin = \"echo\" }", "endpoints[0].name"),
        ("[[endpoints]]\nname = \"a>\"\nexecutor = { builtin = \"echo\" }", "endpoints[0].name"),
        ("[[endpoints]]\nname = \"a\"", "endpoints[0].executor"),
        (
            "[[endpoints]]\nname = \"a\"\nexecutor = { http = { url = \"http://x\" } }",
            "endpoints[0].executor.http",
        ),
        (
            "[[endpoints]]\nname = \"a\"\nexecutor = { process = { command = [] } }",
            "endpoints[0].executor.process.command",
        ),
        (
            "[[endpoints]]\nname = \"a\"\nalias = \"x\"\nexecutor = { builtin = \"echo\" }",
            "endpoints[0].alias",
        ),
        (
            "[[endpoints]]\nname = \"a\"\nproject = \"p\"\nexecutor = { builtin = \"echo\" }",
            "endpoints[0].project",
        ),
        ("[[endpoints]]\nname = \"a\"\nslots = 0\nexecutor = { builtin = \"echo\" }", "endpoints[0].slots"),
        ("[[batch_templates]]\npreset = \"tts\"\nendpoint = \"x\"", "batch_templates[0].endpoint"),
    ] {
        assert_eq!(keys(toml), [key], "{toml}");
    }
    let twice = "[[endpoints]]\nname = \"a\"\nexecutor = { builtin = \"echo\" }\n".repeat(2);
    assert_eq!(keys(&twice), ["endpoints[1].name"]);
    assert_eq!(keys("[nats]\nreplicas = 2\n[worker]\ndevice = \"x\"").len(), 2, "all problems at once");
}

#[test]
fn secrets_come_from_files_and_show_nowhere() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("password");
    std::fs::write(&file, "canary-5f1c\n").unwrap();
    let config = NatsConfig { user: Some("u".into()), password_file: Some(file), ..NatsConfig::default() };
    let password = config.resolve_password().unwrap().unwrap();
    assert_eq!(password.expose(), "canary-5f1c");
    let missing = NatsConfig { password_env: Some("RINGBACK_TEST_UNSET".into()), ..NatsConfig::default() };
    let error = missing.resolve_password().unwrap_err().to_string();
    assert_eq!(error, "nats.password: environment variable RINGBACK_TEST_UNSET is not set or empty");
    let config = RingbackConfig::from_toml(
        "[projects.default]\napi_keys = [{ name = \"a\", key = \"canary-5f1c-long-enough\" }]",
    )
    .unwrap();
    assert!(!format!("{config:?}").contains("canary"));
    assert!(!serde_json::to_string(&config).unwrap().contains("canary"));
}

#[test]
fn the_tts_template_maps_chunks() {
    let template = BatchTemplateConfig {
        preset: Some(TemplatePreset::Tts),
        endpoint: "tts".to_owned(),
        ..BatchTemplateConfig::default()
    }
    .resolve();
    assert_eq!(template.route, "/tts/batch");
    let body = json!({
        "voice_url": "https://v/all",
        "chunks": [
            { "text": "two", "index": 1, "voice_url": "https://v/own" },
            { "text": "one", "index": 0, "voice_url": null },
        ],
    });
    let items = template.map(body.as_object().unwrap()).unwrap();
    assert_eq!(items[0].client_ref, "0");
    assert_eq!(
        serde_json::Value::Object(items[0].input.clone()),
        json!({"text": "one", "audio_prompt_url": "https://v/all", "n_candidates": 3, "whisper_threshold": 85})
    );
    assert_eq!(items[1].input["audio_prompt_url"], "https://v/own", "the chunk's voice wins");

    let refused = |body: serde_json::Value| template.map(body.as_object().unwrap()).unwrap_err().to_string();
    assert_eq!(refused(json!({})), "/chunks: is missing");
    assert_eq!(refused(json!({"chunks": []})), "/chunks: must not be empty");
    assert_eq!(refused(json!({"chunks": [{"index": 0}]})), "/chunks/0/text: is missing");
    assert_eq!(
        refused(json!({"chunks": [{"text": "x", "index": "0"}]})),
        "/chunks/0/index: must be an integer"
    );
    let silent = template.map(json!({"chunks": [{"text": "x", "index": 0}]}).as_object().unwrap()).unwrap();
    assert!(silent[0].input["audio_prompt_url"].is_null());
}

/// Every key of the defaults is documented, and the annotated file says nothing but defaults.
#[test]
fn the_annotated_file_holds_every_key_with_its_default() {
    let text = annotated_toml();
    RingbackConfig::from_toml(&text).expect("as it stands, it changes nothing");
    let examples = text.find("\n# Projects own").expect("examples at the end");
    let active: String = text[..examples]
        .lines()
        .filter_map(|line| match line.strip_prefix("# ") {
            None => Some(format!("{line}\n")),
            Some(rest) => match rest.split_once(" = ") {
                Some((key, _)) if !key.contains(' ') => Some(format!("{rest}\n")),
                _ => None,
            },
        })
        .collect();
    let read = RingbackConfig::from_toml(&active).unwrap();
    assert_eq!(
        serde_json::to_value(&read).unwrap(),
        serde_json::to_value(RingbackConfig::default()).unwrap()
    );
    let uncommented: String = text[examples..]
        .lines()
        .filter(|line| !line.is_empty())
        .map(|line| line.strip_prefix("# ").unwrap_or(line))
        .filter(|line| line.starts_with(['[', ']', ' ']) || line.contains(" = "))
        .map(|line| format!("{line}\n"))
        .collect::<String>()
        .replace("<64 hex digits>", &"0".repeat(64));
    RingbackConfig::from_toml(&uncommented).expect("the examples work");
}

/// docs/CONFIGURATION.md and docs/ringback.example.toml are generated: run with RINGBACK_BLESS=1 to write them.
#[test]
fn the_docs_are_up_to_date() {
    let docs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs");
    for (name, text) in
        [("CONFIGURATION.md", defaults_markdown()), ("ringback.example.toml", annotated_toml())]
    {
        let path = docs.join(name);
        if std::env::var_os("RINGBACK_BLESS").is_some() {
            std::fs::create_dir_all(&docs).unwrap();
            std::fs::write(&path, &text).unwrap();
        }
        let found = std::fs::read_to_string(&path).unwrap_or_default();
        assert!(found == text, "{} is out of date: run the tests once with RINGBACK_BLESS=1", path.display());
    }
}
