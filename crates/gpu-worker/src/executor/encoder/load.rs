//! From configuration to a running encoder: model folder, device, engine, service.

use std::path::Path;
use std::sync::Arc;

use ringback_inference::{
    CpuEngine, CpuOptions, Engine, EngineError, LoadError, Model, OpenOptions, Pooling, ServiceOptions,
    StartError, Task,
};
use ringback_inference_cuda::{Availability, CudaEngine, CudaError, CudaOptions, Precision, is_available};
use ringback_service_runtime::config::{
    EncoderConfig, EncoderPooling, EncoderPrecision, EncoderTask, EndpointConfig,
};
use ringback_service_runtime::time::now_ms;
use tokio::sync::Semaphore;

use super::input::Limits;
use super::metrics::EncoderMetrics;
use super::{Encoder, EncoderService};
use crate::device::{DeviceChoice, DeviceError};
use crate::fatal::Fatal;

/// Why an encoder endpoint cannot start.
#[derive(Debug, thiserror::Error)]
pub enum LoadFailed {
    /// There is no such folder.
    #[error(
        "{0}; `make model` fetches all-MiniLM-L6-v2 into .tools/models/all-MiniLM-L6-v2, or name the folder of another \
         model of the BERT family"
    )]
    NoModel(LoadError),
    /// The model cannot be used.
    #[error(transparent)]
    Model(LoadError),
    /// `device`.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The GPU.
    #[error(transparent)]
    Cuda(#[from] CudaError),
    /// The engine.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// Threads or warm-up.
    #[error(transparent)]
    Start(#[from] StartError),
    /// The engines compute in other formats.
    #[error("precision is {precision}, but the {device} computes in {instead}; set {advice}")]
    Precision {
        /// What was asked for.
        precision: &'static str,
        /// `CPU` or `GPU`.
        device: &'static str,
        /// What it can.
        instead: &'static str,
        /// What makes the two agree.
        advice: &'static str,
    },
}

impl From<LoadError> for LoadFailed {
    fn from(error: LoadError) -> Self {
        match error {
            LoadError::NotAFolder { .. } => Self::NoModel(error),
            other => Self::Model(other),
        }
    }
}

impl Encoder {
    /// Checks what can be checked without reading weights.
    pub(crate) fn check(config: &EncoderConfig, worker_device: DeviceChoice) -> Result<(), LoadFailed> {
        match device_of(config, worker_device)? {
            DeviceChoice::Cpu => cpu_precision(config.precision)?,
            DeviceChoice::Cuda(_) => {
                gpu_precision(config.precision)?;
            }
            // Which of them it will be is not known yet.
            DeviceChoice::Auto => {}
        }
        if config.model.is_dir() {
            return Ok(());
        }
        Err(LoadError::NotAFolder { path: config.model.clone() }.into())
    }

    /// Loads the model and warms the engine up. Blocks until the largest batch has run.
    pub(crate) fn load(
        endpoint: &EndpointConfig,
        config: &EncoderConfig,
        worker_device: DeviceChoice,
        data_dir: &Path,
        fatal: Fatal,
    ) -> Result<Self, LoadFailed> {
        let began = std::time::Instant::now();
        let task = task_of(config.task);
        let model = Model::open(&config.model, task, open_options(config))?;
        let engine = engine(&model, config, device_of(config, worker_device)?, data_dir)?;
        let info = engine.info().clone();
        let options = ServiceOptions {
            max_batch_tokens: info.max_batch_tokens,
            max_batch_sequences: info.max_batch_sequences,
            // Jobs wait for room before they come here.
            max_queued_tokens: usize::MAX,
            max_queued_inputs: count(config.max_queued_inputs),
            max_input_bytes: usize::try_from(config.max_input_bytes).unwrap_or(usize::MAX),
            tokenizer_threads: count(config.tokenizer_threads),
        };
        let room_size = options.max_queued_inputs.clamp(1, Semaphore::MAX_PERMITS);
        let limits = Limits {
            task,
            width: info.output_width,
            max_inputs: count(config.max_inputs),
            truncate: config.truncate,
        };
        let metrics = Arc::new(EncoderMetrics::of(&endpoint.name));
        let service = EncoderService::start(model, engine, options, metrics)?;
        let model_name = model_name(endpoint, config);
        tracing::info!(
            endpoint = endpoint.name,
            model = model_name,
            task = task.name(),
            engine = info.kind,
            device = info.device,
            precision = info.precision,
            max_batch_tokens = info.max_batch_tokens,
            max_seq_len = info.max_seq_len,
            load_ms = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX),
            "encoder ready"
        );
        Ok(Self {
            handle: service.handle(),
            _service: service,
            room: Semaphore::new(room_size),
            room_size,
            limits,
            model_name,
            started_s: now_ms() / 1_000,
            fatal,
        })
    }
}

fn count(n: u32) -> usize {
    usize::try_from(n).unwrap_or(usize::MAX)
}

fn device_of(config: &EncoderConfig, worker_device: DeviceChoice) -> Result<DeviceChoice, DeviceError> {
    config.device.as_deref().map_or(Ok(worker_device), str::parse)
}

/// The CPU's numbers are never narrower than what was asked for, and a CPU that was asked for by name is told so.
fn cpu_precision(asked: Option<EncoderPrecision>) -> Result<(), LoadFailed> {
    match asked {
        None | Some(EncoderPrecision::Fp32) => Ok(()),
        Some(narrow @ (EncoderPrecision::Fp16 | EncoderPrecision::Bf16)) => Err(LoadFailed::Precision {
            precision: narrow.word(),
            device: "CPU",
            instead: "fp32",
            advice: "precision = \"fp32\", or device = \"cuda:0\"",
        }),
    }
}

/// The GPU's format; fp32 is refused rather than narrowed.
fn gpu_precision(asked: Option<EncoderPrecision>) -> Result<Precision, LoadFailed> {
    match asked {
        None | Some(EncoderPrecision::Fp16) => Ok(Precision::Fp16),
        Some(EncoderPrecision::Bf16) => Ok(Precision::Bf16),
        Some(EncoderPrecision::Fp32) => Err(LoadFailed::Precision {
            precision: "fp32",
            device: "GPU",
            instead: "fp16 or bf16",
            advice: "device = \"cpu\" for fp32, or another precision",
        }),
    }
}

fn task_of(task: EncoderTask) -> Task {
    match task {
        EncoderTask::Embed => Task::Embed,
        EncoderTask::Rerank => Task::Rerank,
        EncoderTask::Classify => Task::Classify,
    }
}

fn open_options(config: &EncoderConfig) -> OpenOptions {
    OpenOptions {
        expected_sha256: config.sha256.clone(),
        max_seq_len: config.max_seq_len.map(count),
        pooling: config.pooling.map(|pooling| match pooling {
            EncoderPooling::Mean => Pooling::Mean,
            EncoderPooling::Cls => Pooling::Cls,
        }),
        normalize: config.normalize,
    }
}

/// What answers call the model: the endpoint's `model` or alias, else the folder's name.
fn model_name(endpoint: &EndpointConfig, config: &EncoderConfig) -> String {
    let folder = || config.model.file_name().map(|name| name.to_string_lossy().into_owned());
    endpoint
        .model
        .clone()
        .or_else(|| endpoint.alias.clone())
        .or_else(folder)
        .unwrap_or_else(|| endpoint.name.clone())
}

fn engine(
    model: &Model,
    config: &EncoderConfig,
    choice: DeviceChoice,
    data_dir: &Path,
) -> Result<Box<dyn Engine>, LoadFailed> {
    let engine = match choice {
        DeviceChoice::Cpu => cpu(model, config, true)?,
        DeviceChoice::Cuda(ordinal) => cuda(model, config, usize::from(ordinal), data_dir)?,
        DeviceChoice::Auto => match is_available(&config.cuda_library_dirs) {
            Availability::Available { .. } => cuda(model, config, 0, data_dir)?,
            Availability::Unavailable { reasons } => {
                tracing::info!(
                    reasons = reasons.join("; "),
                    "no GPU can be used; the encoder runs on the CPU"
                );
                cpu(model, config, false)?
            }
        },
    };
    Ok(if ringback_service_runtime::fault::enabled() { Box::new(faulty::Faulty(engine)) } else { engine })
}

fn cpu(model: &Model, config: &EncoderConfig, wanted: bool) -> Result<Box<dyn Engine>, LoadFailed> {
    // With "auto" a host without a GPU computes in more than was asked for.
    if wanted {
        cpu_precision(config.precision)?;
    }
    let defaults = CpuOptions::default();
    let longest = model.encoder().max_seq_len;
    let options = CpuOptions {
        threads: count(config.threads),
        max_batch_tokens: config.max_batch_tokens.map_or(defaults.max_batch_tokens.max(longest), count),
        max_batch_sequences: config.max_batch_sequences.map_or(defaults.max_batch_sequences, count),
    };
    Ok(Box::new(CpuEngine::new(Arc::clone(model.encoder()), options)?))
}

fn cuda(
    model: &Model,
    config: &EncoderConfig,
    ordinal: usize,
    data_dir: &Path,
) -> Result<Box<dyn Engine>, LoadFailed> {
    let precision = gpu_precision(config.precision)?;
    let defaults = CudaOptions::default();
    let options = CudaOptions {
        ordinal,
        precision,
        max_batch_tokens: config.max_batch_tokens.unwrap_or(defaults.max_batch_tokens),
        max_batch_sequences: config.max_batch_sequences.unwrap_or(defaults.max_batch_sequences),
        kernel_cache_dir: Some(data_dir.join("kernels")),
        memory_limit_bytes: config.gpu_memory_limit_bytes,
        library_dirs: config.cuda_library_dirs.clone(),
        ..defaults
    };
    Ok(Box::new(CudaEngine::load(Arc::clone(model.encoder()), &options)?))
}

/// In builds for tests: an engine that is ruined at the batch that `RINGBACK_FAULT=worker.engine.batch@N:fail` names.
mod faulty {
    use ringback_inference::{Batch, Engine, EngineError, EngineInfo, Outputs};
    use ringback_service_runtime::fault;

    pub(super) struct Faulty(pub(super) Box<dyn Engine>);

    impl Engine for Faulty {
        fn info(&self) -> &EngineInfo {
            self.0.info()
        }

        fn warm_up(&mut self) -> Result<(), EngineError> {
            self.0.warm_up()
        }

        fn pipeline_depth(&self) -> usize {
            self.0.pipeline_depth()
        }

        fn submit(&mut self, batch: &Batch) -> Result<(), EngineError> {
            self.0.submit(batch)
        }

        fn collect(&mut self, outputs: &mut Outputs) -> Result<(), EngineError> {
            self.0.collect(outputs)?;
            if fault::fails("worker.engine.batch") {
                return Err(EngineError::Poisoned { detail: "a test ruined it".to_owned() });
            }
            Ok(())
        }

        fn health(&mut self) -> Result<(), EngineError> {
            self.0.health()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(precision: Option<EncoderPrecision>, device: Option<&str>) -> EncoderConfig {
        EncoderConfig {
            // A folder that is there; nothing in it is read.
            model: std::env::temp_dir(),
            device: device.map(str::to_owned),
            precision,
            ..EncoderConfig::default()
        }
    }

    #[test]
    fn a_gpu_refuses_fp32_and_computes_in_what_was_asked_for() {
        assert_eq!(gpu_precision(None).expect("the default"), Precision::Fp16);
        assert_eq!(gpu_precision(Some(EncoderPrecision::Fp16)).expect("fp16"), Precision::Fp16);
        assert_eq!(gpu_precision(Some(EncoderPrecision::Bf16)).expect("bf16"), Precision::Bf16);
        let error = gpu_precision(Some(EncoderPrecision::Fp32)).expect_err("fp32");
        assert_eq!(
            error.to_string(),
            "precision is fp32, but the GPU computes in fp16 or bf16; set device = \"cpu\" for fp32, or another precision"
        );
    }

    #[test]
    fn a_precision_that_the_device_lacks_stops_the_start() {
        let (cpu, gpu) = (DeviceChoice::Cpu, DeviceChoice::Cuda(0));
        for (precision, device, of_worker, refused) in [
            (Some(EncoderPrecision::Fp32), Some("cuda:0"), cpu, Some("the GPU computes in fp16 or bf16")),
            (Some(EncoderPrecision::Fp32), None, gpu, Some("the GPU computes in fp16 or bf16")),
            (Some(EncoderPrecision::Fp16), Some("cpu"), gpu, Some("the CPU computes in fp32")),
            (Some(EncoderPrecision::Bf16), None, cpu, Some("the CPU computes in fp32")),
            (Some(EncoderPrecision::Fp32), Some("cpu"), gpu, None),
            (Some(EncoderPrecision::Fp16), Some("cuda:1"), cpu, None),
            (None, Some("cuda:0"), cpu, None),
            (None, None, cpu, None),
            (Some(EncoderPrecision::Fp32), Some("auto"), gpu, None),
        ] {
            let checked = Encoder::check(&config(precision, device), of_worker).map_err(|e| e.to_string());
            match (refused, &checked) {
                (None, Ok(())) => {}
                (Some(part), Err(text)) if text.contains(part) => {}
                _ => panic!("{precision:?} on {device:?}: {checked:?}"),
            }
        }
    }
}
