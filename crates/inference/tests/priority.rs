//! The threads that compute give way to everything else of the process. On Linux, where a thread has a priority.
#![cfg(target_os = "linux")]

mod common;

use common::{small_config, write_model};
use ringback_inference::{
    CpuEngine, CpuOptions, Encoder, EncoderService, Family, Model, OpenOptions, ServiceOptions, Task,
    Unobserved,
};
use std::{
    collections::BTreeMap,
    fs, io,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

/// Name and nice value of every thread of this process.
fn threads() -> BTreeMap<String, Vec<i32>> {
    let mut all = BTreeMap::<String, Vec<i32>>::new();
    for task in fs::read_dir("/proc/self/task").expect("the threads") {
        let text = match fs::read_to_string(task.expect("a thread").path().join("stat")) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => panic!("{error}"),
        };
        let (before, after) = text.rsplit_once(") ").expect("a name in brackets");
        let (_, name) = before.split_once('(').expect("a name in brackets");
        // `after` begins with the third field; nice is the nineteenth.
        let nice = after.split(' ').nth(16).expect("nice").parse().expect("a number");
        all.entry(name.to_owned()).or_default().push(nice);
    }
    all
}

#[test]
fn threads_that_compute_have_a_lower_priority_than_their_process() {
    let folder = tempfile::tempdir().expect("a folder");
    let encoder = Encoder::random(small_config(Family::Bert, &["LABEL_0"]), Task::Embed, 3);
    write_model(folder.path(), &encoder, "");
    let model = Model::open(folder.path(), Task::Embed, OpenOptions::default()).expect("the model");
    let options = CpuOptions { threads: 3, ..CpuOptions::default() };
    let engine = CpuEngine::new(Arc::clone(model.encoder()), options).expect("an engine");
    let options = ServiceOptions { tokenizer_threads: 2, ..ServiceOptions::default() };
    let service =
        EncoderService::start(model, Box::new(engine), options, Arc::new(Unobserved)).expect("a service");

    let own = fs::read_to_string("/proc/thread-self/stat").expect("this thread");
    let own: i32 =
        own.rsplit_once(") ").expect("a name").1.split(' ').nth(16).expect("nice").parse().expect("nice");
    let lower = (own + 5).min(19);
    let expected = [
        ("encoder-cpu-0", vec![lower]),
        ("encoder-cpu-1", vec![lower]),
        ("encoder-cpu-2", vec![lower]),
        ("encoder-engine", vec![lower]),
        ("encoder-results", vec![lower]),
        ("encoder-tokens", vec![lower; 2]),
    ]
    .map(|(name, nice)| (name.to_owned(), nice));
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        // A thread lowers itself once it runs.
        let (of_encoder, others): (BTreeMap<_, _>, BTreeMap<_, _>) =
            threads().into_iter().partition(|(name, _)| name.starts_with("encoder-"));
        assert!(others.values().flatten().all(|nice| *nice == own), "{others:?}");
        if of_encoder == BTreeMap::from(expected.clone()) {
            break;
        }
        assert!(Instant::now() < deadline, "{of_encoder:?}, expected {expected:?}");
        thread::yield_now();
    }
    service.shutdown();
}
