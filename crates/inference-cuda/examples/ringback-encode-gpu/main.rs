//! Measures the encoder on a GPU: alone with token ids, end to end with texts, and beside sentence-transformers in
//! the same run.
//!
//! ```text
//! cargo build --release -p ringback-inference-cuda --example ringback-encode-gpu
//! target/release/examples/ringback-encode-gpu --model .tools/models/all-MiniLM-L6-v2 --python python3
//! ```
//!
//! Exit codes: 0 measured, 1 a wrong result, 2 it could not measure (no GPU, no model).

mod compare;
mod measure;
mod texts;

use clap::Parser;
use ringback_inference::{EncoderService, Engine, Model, OpenOptions, ServiceOptions, Task, Unobserved};
use ringback_inference_cuda::{
    Availability, CudaEngine, CudaOptions, Precision, is_available, required_bytes,
};
use std::{path::PathBuf, process::ExitCode, sync::Arc, time::Duration};

/// Measures the encoder on a GPU.
#[derive(Debug, Parser)]
struct Arguments {
    /// Folder of the model.
    #[arg(long, default_value = ".tools/models/all-MiniLM-L6-v2")]
    model: PathBuf,
    /// Number of the GPU.
    #[arg(long, default_value_t = 0)]
    ordinal: usize,
    /// fp16 or bf16.
    #[arg(long, default_value = "fp16")]
    precision: String,
    /// Folders with libnvrtc and libcublasLt, looked into before the loader's path.
    #[arg(long = "library-dir")]
    library_dirs: Vec<PathBuf>,
    /// Where compiled kernels are kept.
    #[arg(long)]
    kernel_cache: Option<PathBuf>,
    /// Most tokens of a batch.
    #[arg(long, default_value_t = 16_384)]
    max_batch_tokens: u32,
    /// Tokens per text.
    #[arg(long, value_delimiter = ',', default_value = "16,128,512")]
    lengths: Vec<usize>,
    /// Texts per batch; the largest that fits is always measured too.
    #[arg(long, value_delimiter = ',', default_value = "1,8,32,128")]
    batches: Vec<usize>,
    /// How long each figure is measured.
    #[arg(long, default_value_t = 3.0)]
    seconds: f64,
    /// Dense peak of the chip in this precision; 989 is that of H100 and H200 SXM.
    #[arg(long, default_value_t = 989.0)]
    peak_tflops: f64,
    /// A Python with sentence-transformers and torch, to be measured beside; left out without it.
    #[arg(long)]
    python: Option<PathBuf>,
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failure::Wrong(text)) => {
            eprintln!("wrong result: {text}");
            ExitCode::from(1)
        }
        Err(Failure::CannotMeasure(text)) => {
            eprintln!("cannot measure: {text}");
            ExitCode::from(2)
        }
    }
}

/// Why there are no figures.
pub(crate) enum Failure {
    Wrong(String),
    CannotMeasure(String),
}

impl Failure {
    pub(crate) fn cannot(error: impl std::fmt::Display) -> Self {
        Self::CannotMeasure(error.to_string())
    }
}

fn run(arguments: &Arguments) -> Result<(), Failure> {
    match is_available(&arguments.library_dirs) {
        Availability::Available { devices } => {
            for device in devices {
                let (major, minor) = device.compute_capability;
                println!(
                    "cuda:{} {} sm_{major}{minor} {} MiB",
                    device.ordinal,
                    device.name,
                    device.memory_bytes >> 20
                );
            }
        }
        Availability::Unavailable { reasons } => return Err(Failure::CannotMeasure(reasons.join("; "))),
    }
    let longest = arguments.lengths.iter().copied().max().unwrap_or(128);
    let open = OpenOptions { max_seq_len: Some(longest), ..OpenOptions::default() };
    let model = Model::open(&arguments.model, Task::Embed, open).map_err(Failure::cannot)?;
    let options = CudaOptions {
        ordinal: arguments.ordinal,
        precision: arguments.precision.parse::<Precision>().map_err(Failure::cannot)?,
        max_batch_tokens: arguments.max_batch_tokens,
        kernel_cache_dir: arguments.kernel_cache.clone(),
        library_dirs: arguments.library_dirs.clone(),
        ..CudaOptions::default()
    };
    let encoder = model.encoder().clone();
    println!("memory: {} MiB", required_bytes(&encoder, &options).map_err(Failure::cannot)? >> 20);
    let load = || CudaEngine::load(encoder.clone(), &options).map_err(Failure::cannot);
    let seconds = Duration::from_secs_f64(arguments.seconds);

    let mut engine = load()?;
    engine.warm_up().map_err(Failure::cannot)?;
    let mut without = CudaEngine::load(encoder.clone(), &CudaOptions { graphs: false, ..options.clone() })
        .map_err(Failure::cannot)?;
    println!("\none text of 16 tokens, submit to row        p50 us    p99 us");
    for (what, engine) in [("CUDA graph", &mut engine), ("without graph", &mut without)] {
        let (p50, p99) = measure::latency(engine, &encoder, seconds).map_err(Failure::cannot)?;
        println!("  {what:40} {p50:8.1}  {p99:8.1}");
    }
    drop(without);

    println!("\ntoken ids in, rows out: tokens/text  texts/batch      tokens/s   TFLOP/s  of peak");
    for length in &arguments.lengths {
        let most =
            (arguments.max_batch_tokens as usize / length).min(engine.info().max_batch_sequences).max(1);
        for texts in arguments.batches.iter().copied().filter(|texts| *texts < most).chain([most]) {
            let rate = measure::throughput(&mut engine, &encoder, *length, texts, seconds)
                .map_err(Failure::cannot)?;
            let tflops = rate * measure::flop_per_token(&encoder, *length) / 1e12;
            let share = 100.0 * tflops / arguments.peak_tflops;
            println!("{length:36} {texts:12} {rate:13.0} {tflops:9.1}  {share:6.1} %");
        }
    }
    drop(engine);

    let service = EncoderService::start(
        model.clone(),
        Box::new(load()?),
        ServiceOptions { max_batch_tokens: arguments.max_batch_tokens as usize, ..ServiceOptions::default() },
        Arc::new(Unobserved),
    )
    .map_err(Failure::cannot)?;
    println!("\ntexts in, rows out: tokens/text        tokens/s       texts/s");
    let mut samples = Vec::new();
    for length in &arguments.lengths {
        let texts = texts::of_length(&model, *length)?;
        let (rate, rows) = measure::end_to_end(&service.handle(), &texts, *length, seconds)?;
        println!("{length:31} {rate:15.0} {:13.0}", rate / *length as f64);
        samples.push((*length, texts, rows));
    }
    service.shutdown();

    match &arguments.python {
        Some(python) => compare::sentence_transformers(python, arguments, &samples),
        None => {
            println!("\nsentence-transformers was not measured: name a Python that has it with --python");
            Ok(())
        }
    }
}
