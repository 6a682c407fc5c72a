//! The engine: batches in, rows out, two under way at once.

use crate::{
    device,
    error::{CudaError, engine_error},
    forward::Forward,
    gemm::Gemms,
    gpu::{GpuOps, Kernels},
    graphs::{Choice, GraphKey, Graphs},
    input::{self, Shape},
    kernels::KernelShape,
    library,
    memory::{self, DEPTH, GEMM_WORKSPACE_BYTES, Plan},
    options::CudaOptions,
    slot::Slot,
};
use cudarc::driver::{
    CudaContext, CudaGraph, CudaSlice, CudaStream, DevicePtr, result,
    sys::{CUgraphInstantiate_flags, CUstreamCaptureMode},
};
use ringback_inference::{Batch, Encoder, Engine, EngineError, EngineInfo, Outputs};
use std::{collections::VecDeque, sync::Arc};

/// Graphs kept at most, over both slots: all small shapes of a usual mix.
const MOST_GRAPHS: usize = 128;

/// A batch under way.
struct Pending {
    slot: usize,
    sequences: usize,
}

/// A text encoder on a GPU.
pub struct CudaEngine {
    info: EngineInfo,
    encoder: Arc<Encoder>,
    // Everything on the GPU, in the order in which it goes. `Drop` waits for the streams first.
    graphs: Graphs<OwnedGraph>,
    gemms: Gemms,
    kernels: Kernels,
    forward: Forward,
    slots: Vec<Slot>,
    pending: VecDeque<Pending>,
    next_slot: usize,
    /// Said again to whoever asks after the context was ruined.
    ruined: Option<String>,
    _memory: [CudaSlice<u8>; 3],
    upload: Arc<CudaStream>,
    compute: Arc<CudaStream>,
    download: Arc<CudaStream>,
    context: Arc<CudaContext>,
}

/// A graph that belongs to the engine.
struct OwnedGraph(CudaGraph);

// SAFETY: CUDA's graphs are tied to no thread; they only must not be used by two at once. This one is reached through
// `&mut CudaEngine` alone.
unsafe impl Send for OwnedGraph {}

fn driver(call: &'static str) -> impl Fn(result::DriverError) -> CudaError {
    move |error| CudaError::driver(call, error)
}

impl CudaEngine {
    /// Loads a model onto a GPU: finds the libraries, admits it by its need of memory, compiles the kernels (or takes
    /// them from the cache), copies the weights. [`Engine::warm_up`] should follow.
    ///
    /// # Errors
    /// If something is missing, the model is of a shape that the kernels do not compute, or memory does not suffice.
    pub fn load(encoder: Arc<Encoder>, options: &CudaOptions) -> Result<Self, CudaError> {
        options.check(&encoder)?;
        let shape = KernelShape::of(&encoder.config, options.precision)?;
        let found = device::usable(options.ordinal)?;
        let unavailable = |reason| CudaError::Unavailable { reasons: vec![reason] };
        library::require_nvrtc(&options.library_dirs).map_err(unavailable)?;
        library::require_cublaslt(&options.library_dirs).map_err(unavailable)?;

        let context = CudaContext::new(options.ordinal).map_err(driver("opening the GPU"))?;
        // SAFETY: the engine orders its streams by its own events (see `start`) and frees memory only after it has
        // waited for all of them.
        unsafe { context.disable_event_tracking() };
        let plan = Plan::of(&encoder, shape, options);
        let (free, _) = context.mem_get_info().map_err(driver("asking for free memory"))?;
        memory::admit(plan.total_bytes(), free as u64, options.memory_limit_bytes)?;

        let kernels =
            Kernels::load(&context, found.compute_capability, shape, options.kernel_cache_dir.as_deref())?;
        let stream = || context.new_stream().map_err(driver("a stream"));
        let (upload, compute, download) = (stream()?, stream()?, stream()?);
        let block = |bytes: u64| {
            // Zeros, not what another process left: rows of padding must be numbers.
            compute.alloc_zeros::<u8>(bytes as usize).map_err(driver("memory for the model"))
        };
        let memory = [block(plan.weights_bytes)?, block(plan.workspace_bytes)?, block(GEMM_WORKSPACE_BYTES)?];
        let [weights, workspace, gemm_workspace] =
            [0, 1, 2].map(|part: usize| memory[part].device_ptr(&compute).0);
        copy_weights(&encoder, options, &compute, weights)?;
        let slots = (0..DEPTH)
            .map(|_| Slot::new(&context, &compute, &plan))
            .collect::<Result<Vec<_>, CudaError>>()?;
        let gemms = Gemms::new(options.precision, gemm_workspace)?;
        // All allocations and zeros are done before another stream sees them.
        compute.synchronize().map_err(driver("copying the weights"))?;

        let info = EngineInfo {
            kind: "cuda",
            device: format!("cuda:{} {}", found.ordinal, found.name),
            precision: options.precision.name(),
            max_batch_tokens: options.max_batch_tokens as usize,
            max_batch_sequences: options.max_batch_sequences as usize,
            max_seq_len: encoder.max_seq_len,
            output_width: encoder.output_width(),
        };
        let forward = Forward::new(&encoder, shape, weights, workspace, plan.rows);
        Ok(Self {
            info,
            encoder,
            graphs: Graphs::new(if options.graphs { MOST_GRAPHS } else { 0 }),
            gemms,
            kernels,
            forward,
            slots,
            pending: VecDeque::with_capacity(DEPTH),
            next_slot: 0,
            ruined: None,
            _memory: memory,
            upload,
            compute,
            download,
            context,
        })
    }

    fn check(&self, batch: &Batch) -> Result<(), EngineError> {
        for (name, found, most) in [
            ("tokens", batch.tokens(), self.info.max_batch_tokens),
            ("sequences", batch.sequences(), self.info.max_batch_sequences),
        ] {
            if found > most {
                return Err(EngineError::Rejected { detail: format!("{found} {name}, at most {most} fit") });
            }
        }
        self.encoder.check(batch)
    }

    /// Starts copies and work of the batch that lies in the slot's input.
    fn start(&mut self, slot: usize, shape: Shape) -> Result<(), CudaError> {
        // Streams may belong to a thread that has not seen this context yet.
        self.context.bind_to_thread().map_err(driver("the context"))?;
        let key = GraphKey { slot, shape };
        match self.graphs.choose(key) {
            Choice::Launch(graph) => graph.0.launch().map_err(driver("a graph"))?,
            Choice::Record => match self.record(slot, shape)? {
                Some(graph) => {
                    graph.0.launch().map_err(driver("a graph"))?;
                    self.graphs.insert(key, graph);
                }
                None => {
                    self.graphs.disable();
                    self.on_one_stream(slot, shape)?;
                }
            },
            Choice::Direct if shape.small => self.on_one_stream(slot, shape)?,
            Choice::Direct => return self.on_three_streams(slot, shape),
        }
        self.slots[slot].finished.record(&self.compute).map_err(driver("an event"))
    }

    fn floats(&self, shape: Shape) -> usize {
        shape.sequences as usize * self.info.output_width
    }

    fn forward(&mut self, slot: usize, shape: Shape) -> Result<(), CudaError> {
        let (from, to) = self.slots[slot].addresses(&self.compute);
        // SAFETY: weights, workspace and slots are the engine's, of the sizes of its plan, which holds every shape
        // that `check` lets pass. They outlive the stream's work, because `Drop` waits for it. The workspaces are used
        // on the compute stream only; a slot is used by other streams only before `uploaded` and after `computed`.
        let mut ops = unsafe { GpuOps::new(&self.kernels, &mut self.gemms, &self.compute) };
        self.forward.run(&mut ops, shape, from, to)
    }

    /// Copies and work one after the other: for small batches, where more streams cost more than they hide.
    fn on_one_stream(&mut self, slot: usize, shape: Shape) -> Result<(), CudaError> {
        let floats = self.floats(shape);
        let compute = self.compute.clone();
        self.slots[slot].upload(shape, &compute)?;
        self.forward(slot, shape)?;
        self.slots[slot].download(floats, &compute)
    }

    /// Copies beside the work of the other batch.
    fn on_three_streams(&mut self, slot: usize, shape: Shape) -> Result<(), CudaError> {
        let floats = self.floats(shape);
        let (upload, download) = (self.upload.clone(), self.download.clone());
        self.slots[slot].upload(shape, &upload)?;
        let place = &self.slots[slot];
        place.uploaded.record(&upload).map_err(driver("an event"))?;
        self.compute.wait(&place.uploaded).map_err(driver("an event"))?;
        self.forward(slot, shape)?;
        let place = &self.slots[slot];
        place.computed.record(&self.compute).map_err(driver("an event"))?;
        download.wait(&place.computed).map_err(driver("an event"))?;
        self.slots[slot].download(floats, &download)?;
        self.slots[slot].finished.record(&download).map_err(driver("an event"))
    }

    /// Records a batch as a graph, without running it. `None` if this driver cannot.
    fn record(&mut self, slot: usize, shape: Shape) -> Result<Option<OwnedGraph>, CudaError> {
        let compute = self.compute.clone();
        let mode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        compute.begin_capture(mode).map_err(driver("recording a graph"))?;
        let recorded = self.on_one_stream(slot, shape);
        // Ends the recording also after a failure: the stream would refuse everything else.
        let graph = compute.end_capture(CUgraphInstantiate_flags(0));
        match (recorded, graph) {
            (Ok(()), Ok(Some(graph))) => Ok(Some(OwnedGraph(graph))),
            (Err(error @ CudaError::Driver { poisoned: true, .. }), _) => Err(error),
            (recorded, graph) => {
                let graph = graph.map(|graph| graph.is_some());
                tracing::warn!(?recorded, ?graph, "small batches run without CUDA graphs");
                Ok(None)
            }
        }
    }

    /// Remembers whether the context is ruined.
    fn note<T>(&mut self, result: Result<T, EngineError>) -> Result<T, EngineError> {
        if let Err(EngineError::Poisoned { detail }) = &result {
            self.ruined = Some(detail.clone());
            self.pending.clear();
        }
        result
    }

    fn sound(&self) -> Result<(), EngineError> {
        self.ruined.as_ref().map_or(Ok(()), |detail| Err(EngineError::Poisoned { detail: detail.clone() }))
    }

    fn finish(&mut self, pending: &Pending, outputs: &mut Outputs) -> Result<(), EngineError> {
        let slot = &self.slots[pending.slot];
        slot.finished.synchronize().map_err(|error| engine_error("waiting for a batch", error))?;
        // What a destructor could not say.
        self.context.check_err().map_err(|error| engine_error("an earlier call", error))?;
        let width = self.info.output_width;
        let values = &slot.output()[..pending.sequences * width];
        if let Some(sequence) =
            values.chunks_exact(width).position(|row| row.iter().any(|value| !value.is_finite()))
        {
            return Err(EngineError::NotFinite { sequence });
        }
        outputs.width = width;
        outputs.values.clear();
        outputs.values.extend_from_slice(values);
        Ok(())
    }

    /// A batch of as many tokens as allowed, in sequences of `length`.
    fn full_batch(&self, length: usize) -> Batch {
        let mut batch = Batch::new();
        let ids = vec![0; length];
        let most = self.info.max_batch_sequences.min(self.info.max_batch_tokens / length).max(1);
        for _ in 0..most {
            batch.push(&ids, &ids, self.encoder.config.position_offset);
        }
        batch
    }

    fn run(&mut self, batch: &Batch) -> Result<(), EngineError> {
        let mut outputs = Outputs::default();
        self.submit(batch)?;
        self.collect(&mut outputs)
    }
}

fn copy_weights(
    encoder: &Encoder,
    options: &CudaOptions,
    stream: &CudaStream,
    base: u64,
) -> Result<(), CudaError> {
    crate::weights::WeightMap::write(encoder, options.precision, |offset, bytes| {
        // SAFETY: the block at `base` has the length of the whole map. The source is pageable memory, which the driver
        // has read completely when the call returns.
        unsafe { result::memcpy_htod_async(base + offset, bytes, stream.cu_stream()) }
            .map_err(driver("copying the weights"))
    })
}

impl Engine for CudaEngine {
    fn info(&self) -> &EngineInfo {
        &self.info
    }

    fn warm_up(&mut self) -> Result<(), EngineError> {
        let longest = self.info.max_seq_len.min(self.info.max_batch_tokens).max(1);
        // The most work, the most rows, and both slots; then what a single short text needs.
        for length in [longest, 1, longest, 1] {
            let batch = self.full_batch(length);
            self.run(&batch)?;
        }
        Ok(())
    }

    fn pipeline_depth(&self) -> usize {
        DEPTH
    }

    fn submit(&mut self, batch: &Batch) -> Result<(), EngineError> {
        self.sound()?;
        if self.pending.len() == DEPTH {
            return Err(EngineError::Rejected {
                detail: format!("{DEPTH} batches are under way, collect one first"),
            });
        }
        self.check(batch)?;
        let slot = self.next_slot;
        let shape = Shape::of(batch);
        input::pack(batch, shape, self.slots[slot].input());
        let started = self.start(slot, shape);
        if started.is_err() {
            // What was started of it must not run into the next batch of this slot.
            let idle = self.context.synchronize().map_err(|error| engine_error("a failed batch", error));
            self.note(idle)?;
        }
        self.note(started.map_err(EngineError::from))?;
        self.next_slot = (slot + 1) % DEPTH;
        self.pending.push_back(Pending { slot, sequences: batch.sequences() });
        Ok(())
    }

    fn collect(&mut self, outputs: &mut Outputs) -> Result<(), EngineError> {
        self.sound()?;
        let Some(pending) = self.pending.pop_front() else {
            return Err(EngineError::Rejected { detail: "no batch was submitted".to_owned() });
        };
        let done = self.finish(&pending, outputs);
        self.note(done)
    }

    fn health(&mut self) -> Result<(), EngineError> {
        self.sound()?;
        let mut batch = Batch::new();
        batch.push(&[0], &[0], self.encoder.config.position_offset);
        self.run(&batch)
    }
}

impl Drop for CudaEngine {
    fn drop(&mut self) {
        // Nothing on the GPU may go while work is under way. After a sticky error these fail, and nothing runs.
        for stream in [&self.upload, &self.compute, &self.download] {
            let _ = stream.synchronize();
        }
    }
}
