//! The whole engine on an emulated driver: streams, events, graphs, copies, errors.
//!
//! The driver has to be found by the loader, so each test starts itself again with another library path; the parts
//! that run there are marked as ignored.

use super::{emulator, models, nvrtc, on_gpu, random::Random, reference::cosine};
use crate::{
    Availability, CudaEngine, CudaError, CudaOptions, is_available, kernels::KernelShape,
    precision::Precision,
};
use ringback_inference::{Encoder, Engine, EngineError, FailureClass, Outputs, Task};
use std::{path::PathBuf, process::Command, sync::Arc};

/// What [`models::tiny`] needs.
const SHAPE: KernelShape =
    KernelShape { hidden: 64, head_dim: 32, intermediate: 136, precision: Precision::Fp16 };

/// Set where the emulated driver is on the library path.
const CHILD: &str = "RINGBACK_EMULATED_DRIVER";

/// Runs a test of this file again, with the emulated driver.
fn with_driver(child: &str, settings: &[(&str, &str)]) {
    with_driver_of(SHAPE, child, settings);
}

fn with_driver_of(shape: KernelShape, child: &str, settings: &[(&str, &str)]) {
    let (Some(driver), Some(_)) = (emulator::driver(shape), nvrtc::folder()) else { return };
    let output = Command::new(std::env::current_exe().expect("the test's path"))
        .args(["--include-ignored", "--exact", "--nocapture", &format!("tests::engine::{child}")])
        .env("LD_LIBRARY_PATH", &driver)
        .env(CHILD, &driver)
        .envs(settings.iter().copied())
        .output()
        .expect("the test starts again");
    let text =
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success() && text.contains("1 passed"), "{child} {settings:?}:\n{text}");
    eprintln!("{text}");
}

/// The folder of the driver; none outside of a child, where the test then has nothing to do.
fn driver() -> Option<PathBuf> {
    let folder = std::env::var_os(CHILD).map(PathBuf::from);
    if folder.is_none() {
        eprintln!("a part of another test: it needs the emulated driver");
    }
    folder
}

/// Calls a function of the emulated driver.
fn driver_u32(name: &str, argument: &std::ffi::CStr) -> u32 {
    let path = driver().expect("in a child").join("libcuda.so.1");
    // SAFETY: our own library, open already; the function takes a string and gives a number.
    unsafe {
        let library = libloading::Library::new(path).expect("the emulated driver");
        let function = library
            .get::<unsafe extern "C" fn(*const std::ffi::c_char) -> u32>(name.as_bytes())
            .expect("a function of driver.cc");
        function(argument.as_ptr())
    }
}

/// Lets the next wait fail with this code, and everything after it.
fn break_with(code: i32) {
    let path = driver().expect("in a child").join("libcuda.so.1");
    // SAFETY: our own library, open already; the function takes a number.
    unsafe {
        let library = libloading::Library::new(path).expect("the emulated driver");
        library.get::<unsafe extern "C" fn(i32)>(b"rb_break").expect("rb_break")(code);
    }
}

fn options() -> CudaOptions {
    CudaOptions {
        max_batch_tokens: 1024,
        max_batch_sequences: 64,
        library_dirs: nvrtc::folder().into_iter().collect(),
        // Compiled once for all tests of this file.
        kernel_cache_dir: driver().map(|folder| folder.join("kernels")),
        ..CudaOptions::default()
    }
}

fn engine(encoder: &Arc<Encoder>, options: &CudaOptions) -> CudaEngine {
    CudaEngine::load(encoder.clone(), options).expect("the engine loads on the emulated driver")
}

fn assert_same_direction(found: &Outputs, wanted: &Outputs, what: &str) {
    assert_eq!((found.width, found.values.len()), (wanted.width, wanted.values.len()), "{what}");
    for (row, (found, wanted)) in found.rows().zip(wanted.rows()).enumerate() {
        let cosine = cosine(found, wanted);
        assert!(cosine >= 0.999, "{what}: row {row} has cosine {cosine} to the CPU engine");
    }
}

#[test]
fn embeddings_equal_those_of_the_cpu_engine() {
    with_driver("child_embeds", &[]);
}

#[test]
#[ignore = "a part of the test above"]
fn child_embeds() {
    if driver().is_none() {
        return;
    }
    let mut random = Random::fresh("engine");
    let encoder = Arc::new(models::tiny(Task::Embed, random.next()));
    let mut with_graphs = engine(&encoder, &options());
    let mut without = engine(&encoder, &CudaOptions { graphs: false, ..options() });
    with_graphs.warm_up().expect("warm");
    with_graphs.health().expect("healthy");
    // The engine moves to the thread that will own it.
    let thread = std::thread::spawn(move || {
        let shapes: [&[usize]; 7] =
            [&[1], &[5, 9], &[16], &[31, 1, 64, 127], &[512], &[300, 257, 128, 3], &[40; 25]];
        for lengths in shapes {
            // Small ones several times: step by step, recorded, launched, on both slots.
            let rounds = if lengths.iter().sum::<usize>() > 128 { 2 } else { 6 };
            for round in 0..rounds {
                let batch = models::batch(&encoder, &mut random, lengths);
                let found = models::run(&mut with_graphs, &batch);
                let what = format!("{lengths:?}, round {round}");
                assert_same_direction(&found, &models::on_cpu(&encoder, &batch), &what);
                assert_eq!(found, models::run(&mut without, &batch), "graphs change nothing: {what}");
            }
        }
        // Two batches under way, large beside small, for a while.
        let mut waiting = std::collections::VecDeque::new();
        for round in 0..8 {
            let lengths: &[usize] = [&[200, 400][..], &[7], &[500, 90], &[33, 33]][round % 4];
            let batch = models::batch(&encoder, &mut random, lengths);
            with_graphs.submit(&batch).expect("submitted");
            waiting.push_back(batch);
            if waiting.len() == with_graphs.pipeline_depth() {
                let mut found = Outputs::default();
                with_graphs.collect(&mut found).expect("collected");
                let batch = waiting.pop_front().expect("a batch");
                assert_same_direction(&found, &models::on_cpu(&encoder, &batch), "pipelined");
            }
        }
    });
    thread.join().expect("no panic in the engine's thread");
    assert!(driver_u32("rb_count", c"graph") > 10, "small batches ran as graphs");
}

#[test]
fn logits_equal_those_of_the_cpu_engine() {
    with_driver("child_classifies", &[]);
}

#[test]
#[ignore = "a part of the test above"]
fn child_classifies() {
    if driver().is_none() {
        return;
    }
    let mut random = Random::fresh("classifying engine");
    for task in [Task::Classify, Task::Rerank] {
        let encoder = Arc::new(models::tiny(task, random.next()));
        let mut engine = engine(&encoder, &options());
        let batch = models::batch(&encoder, &mut random, &[3, 64, 65, 17]);
        let (found, wanted) = (models::run(&mut engine, &batch), models::on_cpu(&encoder, &batch));
        assert_eq!(found.width, 3);
        for (found, wanted) in found.values.iter().zip(&wanted.values) {
            assert!((found - wanted).abs() < 0.02, "{found} should be {wanted}");
        }
    }
}

#[test]
fn real_weights_give_the_golden_values() {
    let shape = KernelShape { hidden: 384, head_dim: 32, intermediate: 1536, precision: Precision::Fp16 };
    with_driver_of(shape, "child_is_golden", &[]);
}

#[test]
#[ignore = "a part of the test above"]
fn child_is_golden() {
    if driver().is_some() {
        on_gpu::golden(&options(), 0.999);
    }
}

#[test]
fn a_driver_that_cannot_record_graphs_costs_only_speed() {
    with_driver("child_without_graphs", &[("RB_NO_GRAPHS", "1")]);
}

#[test]
#[ignore = "a part of the test above"]
fn child_without_graphs() {
    if driver().is_none() {
        return;
    }
    let mut random = Random::fresh("engine without graphs");
    let encoder = Arc::new(models::tiny(Task::Embed, random.next()));
    let mut engine = engine(&encoder, &options());
    for _ in 0..6 {
        let batch = models::batch(&encoder, &mut random, &[8]);
        let found = models::run(&mut engine, &batch);
        assert_same_direction(&found, &models::on_cpu(&encoder, &batch), "without graphs");
    }
    assert_eq!(driver_u32("rb_count", c"graph"), 0);
}

#[test]
fn damaged_kernels_on_disk_cost_a_compilation() {
    with_driver("child_with_a_damaged_cache", &[]);
}

#[test]
#[ignore = "a part of the test above"]
fn child_with_a_damaged_cache() {
    if driver().is_none() {
        return;
    }
    let mut random = Random::fresh("engine with a damaged cache");
    let encoder = Arc::new(models::tiny(Task::Embed, random.next()));
    let folder = tempfile::tempdir().expect("a folder");
    let options = CudaOptions { kernel_cache_dir: Some(folder.path().to_owned()), ..options() };
    let batch = models::batch(&encoder, &mut random, &[8, 31]);
    let wanted = models::on_cpu(&encoder, &batch);
    let found = models::run(&mut engine(&encoder, &options), &batch);
    assert_same_direction(&found, &wanted, "on an empty cache");
    let entries: Vec<_> = std::fs::read_dir(folder.path()).expect("the cache").flatten().collect();
    let [entry] = entries.as_slice() else { panic!("{entries:?}") };
    let whole = std::fs::read(entry.path()).expect("the entry");
    for damaged in [&whole[..whole.len() / 2], b"\0".repeat(whole.len()).as_slice()] {
        std::fs::write(entry.path(), damaged).expect("a damaged entry");
        let found = models::run(&mut engine(&encoder, &options), &batch);
        assert_same_direction(&found, &wanted, "after damage");
        let kept = std::fs::read(entry.path()).expect("the entry");
        assert!(kept == whole, "the entry was made again");
    }
}

#[test]
fn the_precision_asked_for_is_the_one_computed_in() {
    with_driver("child_in_each_precision", &[]);
}

#[test]
#[ignore = "a part of the test above"]
fn child_in_each_precision() {
    if driver().is_none() {
        return;
    }
    let encoder = Arc::new(models::tiny(Task::Embed, 1));
    for name in ["fp16", "bf16"] {
        let precision = name.parse().expect("a precision of the GPU");
        // Loaded only: the emulated kernels are those of fp16.
        let engine = engine(&encoder, &CudaOptions { precision, ..options() });
        assert_eq!(engine.info().precision, name);
    }
    let error = "fp32".parse::<Precision>().expect_err("the GPU has no fp32");
    assert_eq!(error.to_string(), "precision is fp32; it must be \"fp16\" or \"bf16\"");
}

#[test]
fn an_illegal_address_poisons_the_engine() {
    with_driver("child_is_poisoned", &[]);
}

#[test]
#[ignore = "a part of the test above"]
fn child_is_poisoned() {
    if driver().is_none() {
        return;
    }
    let mut random = Random::fresh("poison");
    let encoder = Arc::new(models::tiny(Task::Embed, random.next()));
    let mut engine = engine(&encoder, &options());
    let batch = models::batch(&encoder, &mut random, &[8]);
    models::run(&mut engine, &batch);
    let mut outputs = Outputs::default();
    // Wrong batches are refused and ruin nothing.
    let long = models::batch(&encoder, &mut random, &[512, 512, 1]);
    let refused = engine.submit(&long).expect_err("more than the workspace holds");
    assert!(refused.to_string().contains("1025") && refused.to_string().contains("1024"), "{refused}");
    let mut wrong = batch.clone();
    wrong.input_ids[3] = 300;
    assert_eq!(engine.submit(&wrong).map_err(|error| error.class()), Err(FailureClass::Permanent));
    assert_eq!(engine.collect(&mut outputs).map_err(|error| error.class()), Err(FailureClass::Permanent));
    models::run(&mut engine, &batch);

    engine.submit(&batch).expect("submitted");
    engine.submit(&batch).expect("submitted");
    let third = engine.submit(&batch).expect_err("two are under way");
    assert_eq!(third.class(), FailureClass::Permanent, "{third}");
    break_with(700);
    let ruined = engine.collect(&mut outputs).expect_err("the GPU is ruined");
    assert_eq!(ruined.class(), FailureClass::Poisoned, "{ruined}");
    assert!(ruined.to_string().contains("ILLEGAL_ADDRESS"), "{ruined}");
    for error in [engine.submit(&batch), engine.collect(&mut outputs), engine.health(), engine.warm_up()] {
        assert_eq!(error, Err(EngineError::Poisoned { detail: detail(&ruined) }));
    }
    // Does not hang or crash either.
    drop(engine);
}

fn detail(error: &EngineError) -> String {
    match error {
        EngineError::Poisoned { detail } => detail.clone(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn an_overflow_is_told_by_sequence() {
    with_driver("child_overflows", &[]);
}

#[test]
#[ignore = "a part of the test above"]
fn child_overflows() {
    if driver().is_none() {
        return;
    }
    let mut random = Random::fresh("overflow");
    let mut encoder = models::tiny(Task::Embed, random.next());
    // A token whose row leaves the range of fp16 inside of the first layer.
    let bias = &mut encoder.weights.layers[0].intermediate.bias;
    bias.iter_mut().for_each(|bias| *bias = 60_000.0);
    encoder.weights.layers[0].output.weight.iter_mut().for_each(|weight| *weight = 1.0);
    let encoder = Arc::new(encoder);
    let mut engine = engine(&encoder, &options());
    let batch = models::batch(&encoder, &mut random, &[4, 4]);
    engine.submit(&batch).expect("submitted");
    let error = engine.collect(&mut Outputs::default()).expect_err("infinite");
    assert_eq!(error, EngineError::NotFinite { sequence: 0 });
    engine.submit(&batch).expect("the engine goes on");

    let mut encoder = (*encoder).clone();
    encoder.weights.word_embeddings[5] = 1e6;
    let error = CudaEngine::load(Arc::new(encoder), &options()).map(drop).expect_err("beyond fp16");
    assert!(matches!(error, CudaError::Overflow { .. }), "{error}");
    assert!(error.to_string().contains("word_embeddings") && error.to_string().contains("bf16"), "{error}");
}

#[test]
fn what_does_not_fit_or_is_not_there_is_refused_in_words() {
    with_driver("child_is_refused", &[("RB_FREE_MIB", "40"), ("RB_EXPECT", "OutOfMemory")]);
    with_driver("child_is_refused", &[("RB_CAPABILITY", "75"), ("RB_EXPECT", "TooOld")]);
    with_driver("child_is_refused", &[("RB_DEVICES", "0"), ("RB_EXPECT", "Unavailable")]);
    with_driver("child_is_refused", &[("RB_INIT", "100"), ("RB_EXPECT", "Unavailable")]);
}

#[test]
#[ignore = "a part of the test above"]
fn child_is_refused() {
    let (Some(_), Ok(expected)) = (driver(), std::env::var("RB_EXPECT")) else { return };
    let encoder = Arc::new(models::tiny(Task::Embed, 1));
    let error = CudaEngine::load(encoder.clone(), &options()).map(drop).expect_err("refused");
    assert!(format!("{error:?}").starts_with(&expected), "{error:?}");
    eprintln!("{error}");
    if expected == "Unavailable" {
        assert!(!is_available(&options().library_dirs).is_available());
        return;
    }
    let Availability::Available { devices } = is_available(&options().library_dirs) else {
        panic!("it is there")
    };
    assert_eq!((devices.len(), devices[0].name.as_str()), (1, "Emulated GPU"));
    let error =
        CudaEngine::load(encoder, &CudaOptions { ordinal: 3, ..options() }).map(drop).expect_err("no GPU 3");
    assert!(matches!(error, CudaError::NoSuchDevice { ordinal: 3, count: 1 }), "{error}");
}
