//! `ringback-encode`: tokens per CPU second of the CPU engine beside onnxruntime, on the same weights and tokens, in
//! turns on the same machine. See `--help`.

use std::{
    collections::BTreeMap,
    error::Error,
    io::Write,
    path::PathBuf,
    process::{Command, ExitCode, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use clap::Parser;
use ringback_inference::{Batch, CpuEngine, CpuOptions, Engine, Model, OpenOptions, Outputs, Task};
use rustix::time::{ClockId, clock_gettime};
use serde::Deserialize;

/// Measures what a second of CPU time is worth: wall time says little on a shared machine.
#[derive(Debug, Parser)]
#[command(name = "ringback-encode")]
struct Cli {
    /// The model's folder.
    #[arg(long, default_value = ".tools/models/all-MiniLM-L6-v2")]
    model: PathBuf,
    /// The Python with onnx and onnxruntime.
    #[arg(long, default_value = ".tools/venv-onnx/bin/python")]
    python: PathBuf,
    /// Measures the engine only.
    #[arg(long)]
    alone: bool,
    /// The reference that it runs.
    #[arg(long, default_value = "crates/inference/tests/reference.py")]
    reference: PathBuf,
    /// Threads of both.
    #[arg(long, default_value_t = 1)]
    threads: usize,
    /// CPU seconds per shape, engine and round.
    #[arg(long, default_value_t = 2.0)]
    seconds: f64,
    /// Rounds; the better one of each counts, for neighbours only ever take away.
    #[arg(long, default_value_t = 2)]
    rounds: usize,
    /// Shapes: sequences x tokens of each.
    #[arg(long, value_delimiter = ',', default_value = "1x16,1x128,8x128,32x128,32x32,8x256")]
    shapes: Vec<String>,
}

#[derive(Deserialize)]
struct Reference {
    engine: String,
    tokens_per_cpu_second: BTreeMap<String, f64>,
}

type Failure = Box<dyn Error + Send + Sync>;

fn main() -> ExitCode {
    match run(&Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("ringback-encode: {error}");
            ExitCode::from(2)
        }
    }
}

fn run(cli: &Cli) -> Result<(), Failure> {
    if !cli.alone && !cli.python.exists() {
        let python = cli.python.display();
        return Err(format!("{python} is missing: `tools/setup onnx` makes it, --alone does without").into());
    }
    let shapes: Vec<(usize, usize)> =
        cli.shapes.iter().map(|shape| parse(shape)).collect::<Result<_, _>>()?;
    let longest = shapes.iter().map(|shape| shape.1).max().unwrap_or(1);
    let options = OpenOptions { max_seq_len: Some(longest.max(16)), ..OpenOptions::default() };
    let model = Model::open(&cli.model, Task::Embed, options)?;
    let largest = shapes.iter().map(|(count, length)| count * length).max().unwrap_or(1);
    let options = CpuOptions {
        threads: cli.threads,
        max_batch_tokens: largest.max(longest).max(16),
        max_batch_sequences: shapes.iter().map(|shape| shape.0).max().unwrap_or(1),
    };
    let mut engine = CpuEngine::new(Arc::clone(model.encoder()), options)?;
    println!("engine: {} ({})", engine.info().device, engine.info().precision);
    let (mut ours, mut theirs) = (BTreeMap::new(), BTreeMap::new());
    for _ in 0..cli.rounds.max(1) {
        for (name, shape) in cli.shapes.iter().zip(&shapes) {
            better(&mut ours, name, speed(&mut engine, *shape, cli.seconds)?);
        }
        if cli.alone {
            continue;
        }
        let reference = reference(cli)?;
        for (name, speed) in &reference.tokens_per_cpu_second {
            better(&mut theirs, name, *speed);
        }
        println!("beside: {}", reference.engine);
    }
    print!("\n{}", table(cli, &ours, &theirs));
    Ok(())
}

/// The table of docs/PERFORMANCE.md: tokens per CPU second.
fn table(cli: &Cli, ours: &BTreeMap<String, f64>, theirs: &BTreeMap<String, f64>) -> String {
    let row = |name: &str, cell: &dyn Fn(&str) -> String| {
        let cells: Vec<String> = cli.shapes.iter().map(|shape| cell(shape)).collect();
        format!("| {name} | {} |\n", cells.join(" | "))
    };
    let speed = |of: &BTreeMap<String, f64>, shape: &str| of.get(shape).copied().unwrap_or(f64::NAN);
    let threads = if cli.threads == 1 { "one thread".to_owned() } else { format!("{} threads", cli.threads) };
    let mut table = row("sequences x tokens", &|shape| shape.to_owned());
    table += &format!("|---|{}\n", "---|".repeat(cli.shapes.len()));
    table += &row(&format!("CPU engine, {threads}"), &|shape| format!("{:.0}", speed(ours, shape)));
    if !cli.alone {
        table += &row(&format!("onnxruntime, {threads}"), &|shape| format!("{:.0}", speed(theirs, shape)));
        let share = |shape: &str| format!("{:.0} %", 100.0 * speed(ours, shape) / speed(theirs, shape));
        table += &row("share", &share);
    }
    table
}

fn parse(shape: &str) -> Result<(usize, usize), Failure> {
    let numbers =
        shape.split_once('x').and_then(|(count, length)| Some((count.parse().ok()?, length.parse().ok()?)));
    match numbers {
        Some((count, length)) if count > 0 && length > 0 => Ok((count, length)),
        _ => Err(format!("--shapes: {shape:?} is not <sequences>x<tokens>, for example 8x128").into()),
    }
}

fn better(best: &mut BTreeMap<String, f64>, name: &str, speed: f64) {
    let entry = best.entry(name.to_owned()).or_insert(speed);
    *entry = entry.max(speed);
}

/// CPU time of this process, all threads.
fn cpu_time() -> Duration {
    let now = clock_gettime(ClockId::ProcessCPUTime);
    Duration::new(u64::try_from(now.tv_sec).unwrap_or(0), u32::try_from(now.tv_nsec).unwrap_or(0))
}

fn speed(engine: &mut CpuEngine, (count, length): (usize, usize), seconds: f64) -> Result<f64, Failure> {
    let mut batch = Batch::new();
    for row in 0..count {
        // The formula of the reference: the same tokens.
        let ids: Vec<u32> =
            (0..length).map(|column| ((row * 7_919 + column * 104_729) % 30_000 + 500) as u32).collect();
        batch.push(&ids, &vec![0; length], 0);
    }
    let mut outputs = Outputs::default();
    let mut once = || -> Result<(), Failure> {
        engine.submit(&batch)?;
        Ok(engine.collect(&mut outputs)?)
    };
    for _ in 0..2 {
        once()?;
    }
    let (begun, patience, mut runs) = (cpu_time(), Instant::now(), 0);
    let spent = loop {
        once()?;
        runs += 1;
        let spent = (cpu_time() - begun).as_secs_f64();
        if spent >= seconds || patience.elapsed() > Duration::from_secs(300) {
            break spent;
        }
    };
    Ok((runs * count * length) as f64 / spent)
}

fn reference(cli: &Cli) -> Result<Reference, Failure> {
    let mut child = Command::new(&cli.python)
        .arg(&cli.reference)
        .arg("speed")
        .arg(&cli.model)
        .args([cli.threads.to_string(), cli.seconds.to_string()])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(|error| format!("{} does not start: {error}", cli.python.display()))?;
    let shapes = serde_json::to_vec(&cli.shapes)?;
    child.stdin.take().ok_or("no stdin")?.write_all(&shapes)?;
    let output = child.wait_with_output()?;
    if !output.status.success() {
        return Err(format!("{} failed ({})", cli.reference.display(), output.status).into());
    }
    Ok(serde_json::from_slice(&output.stdout)?)
}
