//! The targets of fuzz/ on stable Rust: the corpus, and what becomes of it when it is mutated at random.
//!
//! `RINGBACK_FUZZ_SECONDS` is the time for each of them (30 with CI=true, else 1); `RINGBACK_FUZZ_SEED` repeats a run.
//! Each runs on one thread. `cargo fuzz run <target>` runs the same functions under libFuzzer.

#[path = "../../fuzz/targets.rs"]
mod targets;

use ringback_test_support::tools;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

/// Pieces that mutations put in: what parsers look for, and what breaks them.
const PIECES: [&[u8]; 60] = [
    b"webhook-id: ",
    b"webhook-timestamp: ",
    b"webhook-signature: ",
    b"svix-id: ",
    b"svix-timestamp: ",
    b"svix-signature: ",
    b"Runflow-Signature: ",
    b"v1,",
    b"v1a,",
    b" v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=",
    b"1614265330",
    b"-9223372036854775808",
    b"9223372036854775807",
    b"80ec8a89ce3cd22133a1066caecb4d04fea7467657c8514d717ec42c38a5c94c",
    b"\n",
    b"\n\n",
    b"\r\n",
    b"\"type\":",
    b"\"event\":",
    b"\"run_id\":",
    b"\"batch_id\":",
    b"\"status\":\"COMPLETED\"",
    b"\"output\":{\"error\":",
    b"\"audio_base64\":\"UklGRg==\"",
    b"\"download_url\":\"https://",
    b"\"confirmation_url\":",
    b"\"delayTime\":1e400",
    b"\"executionTime\":-0.5",
    b"[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[",
    b"{\"a\":",
    b"null",
    b"\\ud800",
    b"\\u0000",
    b"../",
    b"..\\",
    b"%2e%2e%2f",
    b"CON.",
    b"\xe2\x80\xae",
    b"\xef\xbc\x8f",
    b"\xf0\x9f\x98\x80",
    b"\xff\xfe",
    b"\0",
    b"confirm",
    b". .",
    b"\n--- config.json\n",
    b"\n--- model.safetensors\n",
    b"\n--- header.json\n",
    b"\n--- tokenizer.json\n",
    b"\n--- task\nrerank",
    b"\"data_offsets\":[0,18446744073709551615]",
    b"\"shape\":[4294967296,4294967296]",
    b"\"dtype\":\"F64\"",
    b"18446744073709551616",
    b"16777216",
    b"-1",
    b"1e308",
    b"\"type\":\"Unigram\"",
    b"\"type\":\"Sequence\"",
    b"\"Regex\":\"(a|aa)+$\"",
    b"\0\0\0\0\0\0\0\x10",
];

/// xorshift64*: enough for fuzzing, the same on every machine.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    fn below(&mut self, limit: usize) -> usize {
        usize::try_from(self.next() % (limit.max(1) as u64)).expect("below a usize")
    }
}

fn mutate(random: &mut Random, corpus: &[Vec<u8>]) -> Vec<u8> {
    let mut data = corpus[random.below(corpus.len())].clone();
    for _ in 0..=random.below(4) {
        let at = random.below(data.len() + 1);
        let end = (at + random.below(24)).min(data.len());
        match random.below(8) {
            0 if at < data.len() => data[at] ^= 1 << random.below(8),
            1 if at < data.len() => data[at] = u8::try_from(random.below(256)).expect("a byte"),
            2 => drop(data.drain(at..end)),
            3 => {
                let copy = data[at..end].to_vec();
                let times = 1 + random.below(40);
                data.splice(at..at, copy.repeat(times));
            }
            4 => {
                let other = &corpus[random.below(corpus.len())];
                data.truncate(at);
                data.extend_from_slice(&other[random.below(other.len() + 1)..]);
            }
            5 => data.truncate(at),
            _ => drop(data.splice(
                at..end.min(at + random.below(2)),
                PIECES[random.below(PIECES.len())].iter().copied(),
            )),
        }
        data.truncate(16 * 1024);
    }
    data
}

fn budget() -> Duration {
    let ci = std::env::var("CI").as_deref() == Ok("true");
    let seconds = std::env::var("RINGBACK_FUZZ_SECONDS").map_or(if ci { 30.0 } else { 1.0 }, |text| {
        text.parse().expect("RINGBACK_FUZZ_SECONDS is a number of seconds")
    });
    Duration::from_secs_f64(seconds)
}

fn fuzz(name: &str, target: fn(&[u8])) {
    let folder = tools::root().join("fuzz/corpus").join(name);
    let mut files: Vec<_> = std::fs::read_dir(&folder)
        .expect("the corpus")
        .map(|entry| entry.expect("an entry").path())
        .collect();
    files.sort();
    let corpus: Vec<Vec<u8>> = files.iter().map(|file| std::fs::read(file).expect("a file")).collect();
    assert!(corpus.len() >= 5, "the corpus of {name} is gone");
    let seed = std::env::var("RINGBACK_FUZZ_SEED").map_or_else(
        |_| u64::try_from(uuid::Uuid::now_v7().as_u128() & u128::from(u64::MAX)).expect("64 bits") | 1,
        |text| text.parse().expect("RINGBACK_FUZZ_SEED is a number"),
    );
    let check = |data: &[u8], what: &str| {
        if catch_unwind(AssertUnwindSafe(|| target(data))).is_err() {
            let file = std::env::temp_dir().join(format!("ringback-fuzz-{name}-{seed}"));
            std::fs::write(&file, data).expect("write");
            panic!("{name}: {what} fails (seed {seed}); kept as {}: {data:?}", file.display());
        }
    };
    for (file, data) in files.iter().zip(&corpus) {
        check(data, &file.display().to_string());
    }
    let (mut random, begun, mut runs) = (Random(seed), Instant::now(), 0_u64);
    while begun.elapsed() < budget() {
        for _ in 0..100 {
            check(&mutate(&mut random, &corpus), "a mutation");
            runs += 1;
        }
    }
    println!("{name}: {runs} mutations of {} files in {:?}, seed {seed}", corpus.len(), begun.elapsed());
}

#[test]
fn signature_headers() {
    fuzz("signature_headers", targets::signature_headers);
}

#[test]
fn callback_bodies() {
    fuzz("callback_bodies", targets::callback_bodies);
}

#[test]
fn file_names() {
    fuzz("file_names", targets::file_names);
}

#[test]
fn model_folders() {
    fuzz("model_folders", targets::model_folders);
}
