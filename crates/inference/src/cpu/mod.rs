//! The engine without a GPU: fp32 on all cores, with the vectors that the processor has (AVX-512, AVX2, NEON, none).

mod aligned;
mod attention;
mod forward;
mod gemm;
mod math;
mod pool;
#[cfg(test)]
mod tests;

use crate::{
    batch::{Batch, Outputs},
    encoder::Encoder,
    engine::{Engine, EngineError, EngineInfo},
    priority,
};
use forward::Forward;
use pool::Head;
use pulp::Arch;
use std::{collections::VecDeque, sync::Arc, thread};

/// Settings of the CPU engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CpuOptions {
    /// Threads for the arithmetic; 0 means one per core.
    pub threads: usize,
    /// Most tokens of a batch. A batch runs to its end before another request gets its turn, so this bounds the wait.
    pub max_batch_tokens: usize,
    /// Most sequences of a batch.
    pub max_batch_sequences: usize,
}

impl Default for CpuOptions {
    fn default() -> Self {
        Self { threads: 0, max_batch_tokens: 4_096, max_batch_sequences: 256 }
    }
}

/// Runs an encoder on the processor.
pub struct CpuEngine {
    encoder: Arc<Encoder>,
    info: EngineInfo,
    arch: Arch,
    forward: Forward,
    head: Option<Head>,
    submitted: VecDeque<Batch>,
    spare: Batch,
}

impl CpuEngine {
    /// Packs the weights for this processor and starts its threads.
    ///
    /// # Errors
    /// If the system gives no threads, or a setting makes no sense.
    pub fn new(encoder: Arc<Encoder>, options: CpuOptions) -> Result<Self, EngineError> {
        Self::with_arch(encoder, options, Arch::new())
    }

    fn with_arch(encoder: Arc<Encoder>, options: CpuOptions, arch: Arch) -> Result<Self, EngineError> {
        let rejected = |detail: String| EngineError::Rejected { detail };
        if options.max_batch_tokens < encoder.max_seq_len {
            return Err(rejected(format!(
                "max_batch_tokens is {}, it must hold one sequence of {} tokens",
                options.max_batch_tokens, encoder.max_seq_len
            )));
        }
        if options.max_batch_sequences == 0 {
            return Err(rejected("max_batch_sequences is 0, it must be at least 1".to_owned()));
        }
        let threads = match options.threads {
            0 => thread::available_parallelism().map_or(1, usize::from),
            given => given,
        };
        let pool = if threads > 1 {
            let builder = rayon::ThreadPoolBuilder::new()
                .num_threads(threads)
                .start_handler(|_| priority::lower())
                .thread_name(|index| format!("encoder-cpu-{index}"));
            let pool =
                builder.build().map_err(|error| EngineError::Transient { detail: error.to_string() })?;
            Some(pool)
        } else {
            None
        };
        let lanes = gemm::lanes(arch);
        let info = EngineInfo {
            kind: "cpu",
            device: format!("{threads} threads, vectors of {} bits", lanes * 32),
            precision: "fp32",
            max_batch_tokens: options.max_batch_tokens,
            max_batch_sequences: options.max_batch_sequences,
            max_seq_len: encoder.max_seq_len,
            output_width: encoder.output_width(),
        };
        Ok(Self {
            head: Head::new(&encoder, lanes),
            forward: Forward::new(Arc::clone(&encoder), arch, pool),
            encoder,
            info,
            arch,
            submitted: VecDeque::new(),
            spare: Batch::new(),
        })
    }

    fn compute(&mut self, batch: &Batch, outputs: &mut Outputs) -> Result<(), EngineError> {
        let hidden = self.forward.run(batch);
        match &mut self.head {
            Some(head) => head.run(self.arch, batch, hidden, outputs),
            None => pool::embed(&self.encoder, batch, hidden, outputs),
        }
        match outputs.rows().position(|row| row.iter().any(|value| !value.is_finite())) {
            Some(sequence) => Err(EngineError::NotFinite { sequence }),
            None => Ok(()),
        }
    }

    /// Runs a batch of `sequences` with `length` tokens each, made of the token with id 0.
    fn try_out(&mut self, sequences: usize, length: usize) -> Result<(), EngineError> {
        let mut batch = Batch::new();
        let (ids, offset) = (vec![0; length], self.encoder.config.position_offset);
        for _ in 0..sequences {
            batch.push(&ids, &ids, offset);
        }
        self.submit(&batch)?;
        self.collect(&mut Outputs::default())
    }
}

impl Engine for CpuEngine {
    fn info(&self) -> &EngineInfo {
        &self.info
    }

    fn warm_up(&mut self) -> Result<(), EngineError> {
        let length = self.info.max_seq_len;
        let sequences = (self.info.max_batch_tokens / length).clamp(1, self.info.max_batch_sequences);
        self.try_out(sequences, length)
    }

    fn submit(&mut self, batch: &Batch) -> Result<(), EngineError> {
        let EngineInfo { max_batch_tokens, max_batch_sequences, .. } = self.info;
        for (name, found, limit) in [
            ("tokens", batch.tokens(), max_batch_tokens),
            ("sequences", batch.sequences(), max_batch_sequences),
        ] {
            if found > limit {
                let detail = format!("it has {found} {name}, the engine takes at most {limit}");
                return Err(EngineError::Rejected { detail });
            }
        }
        self.encoder.check(batch)?;
        let mut copy = std::mem::take(&mut self.spare);
        copy.clone_from(batch);
        self.submitted.push_back(copy);
        Ok(())
    }

    fn collect(&mut self, outputs: &mut Outputs) -> Result<(), EngineError> {
        let Some(batch) = self.submitted.pop_front() else {
            return Err(EngineError::Rejected { detail: "no batch was submitted".to_owned() });
        };
        let result = self.compute(&batch, outputs);
        self.spare = batch;
        result
    }

    fn health(&mut self) -> Result<(), EngineError> {
        self.try_out(1, 1)
    }
}

impl std::fmt::Debug for CpuEngine {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("CpuEngine").field("info", &self.info).finish_non_exhaustive()
    }
}
