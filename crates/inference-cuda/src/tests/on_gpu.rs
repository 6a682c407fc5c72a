//! The same checks on a real GPU, and what only a GPU can show. Without one they are skipped, aloud; `CI=true` does
//! not ask for one. `RINGBACK_CUDA_LIBRARIES` names folders with NVRTC and cublasLt.

use super::{
    checks, models, nvrtc,
    random::Random,
    reference::cosine,
    rig::Rig,
    tools::{need, tool},
};
use crate::{
    Availability, CudaEngine, CudaOptions, device,
    forward::{Arg, Gemm, Ops},
    gemm::Gemms,
    gpu::{GpuOps, Kernels},
    is_available,
    kernels::{Kernel, KernelShape},
    memory::GEMM_WORKSPACE_BYTES,
    precision::Precision,
};
use cudarc::driver::{CudaContext, CudaSlice, CudaStream, DevicePtr};
use ringback_inference::{
    Batch, EncodeInput, Encoder, Engine, Family, Model, ModelConfig, OpenOptions, ProblemType, Task,
};
use std::{collections::HashMap, path::PathBuf, sync::Arc};

/// Shapes of real models.
const SHAPES: [KernelShape; 3] = [
    KernelShape { hidden: 384, head_dim: 32, intermediate: 1536, precision: Precision::Fp16 },
    KernelShape { hidden: 768, head_dim: 64, intermediate: 3072, precision: Precision::Bf16 },
    KernelShape { hidden: 64, head_dim: 32, intermediate: 136, precision: Precision::Fp16 },
];

fn library_dirs() -> Vec<PathBuf> {
    let named = std::env::var_os("RINGBACK_CUDA_LIBRARIES");
    let named = named.map(|list| std::env::split_paths(&list).collect::<Vec<_>>()).unwrap_or_default();
    named.into_iter().chain(nvrtc::fetched()).collect()
}

/// Whether there is a GPU to test on. With `RINGBACK_NEED_GPU`, as `make test-gpu` sets it, there must be one.
fn gpu() -> bool {
    match is_available(&library_dirs()) {
        Availability::Available { .. } => true,
        Availability::Unavailable { reasons } => {
            assert!(std::env::var_os("RINGBACK_NEED_GPU").is_none(), "no GPU: {}", reasons.join("; "));
            eprintln!("\n======== SKIPPED, no GPU: {} ========\n", reasons.join("; "));
            false
        }
    }
}

/// Kernels on GPU 0, one after the other.
struct Gpu {
    shape: KernelShape,
    kernels: Kernels,
    gemms: Gemms,
    stream: Arc<CudaStream>,
    memory: HashMap<u64, CudaSlice<u8>>,
}

impl Gpu {
    fn new(shape: KernelShape) -> Self {
        let found = device::usable(0).expect("GPU 0");
        let context = CudaContext::new(0).expect("a context");
        let stream = context.new_stream().expect("a stream");
        let kernels = Kernels::load(&context, found.compute_capability, shape, None).expect("kernels");
        let workspace = stream.alloc_zeros::<u8>(GEMM_WORKSPACE_BYTES as usize).expect("a workspace");
        let at = workspace.device_ptr(&stream).0;
        let gemms = Gemms::new(shape.precision, at).expect("cublasLt");
        stream.synchronize().expect("ready");
        Self { shape, kernels, gemms, stream, memory: HashMap::from([(at, workspace)]) }
    }

    fn run(&mut self, work: impl FnOnce(&mut GpuOps<'_>)) {
        // SAFETY: the memory behind the checks' addresses is kept in `memory`; one stream does everything, and it is
        // waited for before anything else happens.
        let mut ops = unsafe { GpuOps::new(&self.kernels, &mut self.gemms, &self.stream) };
        work(&mut ops);
        self.stream.synchronize().expect("the work ends well");
    }
}

impl Rig for Gpu {
    fn shape(&self) -> KernelShape {
        self.shape
    }

    fn put(&mut self, bytes: &[u8]) -> u64 {
        let slice = self.stream.clone_htod(bytes).expect("memory");
        self.stream.synchronize().expect("copied");
        let at = slice.device_ptr(&self.stream).0;
        self.memory.insert(at, slice);
        at
    }

    fn get(&mut self, at: u64, bytes: usize) -> Vec<u8> {
        let mut content = self.stream.clone_dtoh(&self.memory[&at]).expect("copied back");
        self.stream.synchronize().expect("copied back");
        content.truncate(bytes);
        content
    }

    fn launch(&mut self, kernel: Kernel, grid: [u32; 2], args: &[Arg]) {
        self.run(|ops| ops.launch(kernel, grid, args).expect("launched"));
    }

    fn gemm(&mut self, gemm: Gemm) {
        self.run(|ops| ops.gemm(gemm).expect("started"));
    }
}

#[test]
fn each_kernel_equals_the_reference() {
    if !gpu() {
        return;
    }
    let mut random = Random::fresh("kernels on the GPU");
    for shape in SHAPES {
        let gpu = &mut Gpu::new(shape);
        for rows in [1, 33, 1000] {
            checks::embedding(gpu, &mut random, rows);
            checks::residual_norm(gpu, &mut random, rows);
            checks::gelu(gpu, &mut random, rows);
        }
        checks::attention(gpu, &mut random, &checks::LENGTHS, 1.0);
        checks::attention(gpu, &mut random, &[70, 3], 16.0);
        checks::pooling(gpu, &mut random, &[1, 7, 8, 9, 40, 512]);
        checks::classifier(gpu, &mut random, &[4, 1, 9], 11);
        checks::product(gpu, &mut random, 48, 1152, 384);
        checks::product(gpu, &mut random, 1, 64, 136);
    }
}

/// A random model of the size of all-MiniLM-L6-v2.
fn mini_lm(seed: u64) -> Arc<Encoder> {
    let config = ModelConfig {
        family: Family::Bert,
        hidden_size: 384,
        intermediate_size: 1536,
        num_hidden_layers: 6,
        num_attention_heads: 12,
        vocab_size: 30_522,
        max_position_embeddings: 512,
        type_vocab_size: 2,
        layer_norm_eps: 1e-12,
        position_offset: 0,
        labels: vec!["LABEL_0".to_owned()],
        problem_type: ProblemType::SingleLabel,
    };
    Arc::new(Encoder::random(config, Task::Embed, seed))
}

fn options() -> CudaOptions {
    CudaOptions { library_dirs: library_dirs(), ..CudaOptions::default() }
}

#[test]
fn the_engine_equals_the_cpu_engine_with_and_without_graphs() {
    if !gpu() {
        return;
    }
    let mut random = Random::fresh("engine on the GPU");
    let encoder = mini_lm(random.next());
    let mut with_graphs = CudaEngine::load(encoder.clone(), &options()).expect("loaded");
    let mut without =
        CudaEngine::load(encoder.clone(), &CudaOptions { graphs: false, ..options() }).expect("loaded");
    with_graphs.warm_up().expect("warm");
    with_graphs.health().expect("healthy");
    for lengths in [&[1][..], &[5, 9], &[31, 1, 64, 127], &[512], &[300, 257, 128, 3], &[40; 64], &[128; 64]]
    {
        for _ in 0..6 {
            let batch = models::batch(&encoder, &mut random, lengths);
            let found = models::run(&mut with_graphs, &batch);
            assert_eq!(found, models::run(&mut without, &batch), "graphs change nothing: {lengths:?}");
            let wanted = models::on_cpu(&encoder, &batch);
            for (found, wanted) in found.rows().zip(wanted.rows()) {
                let cosine = cosine(found, wanted);
                assert!(cosine >= 0.999, "cosine {cosine} for {lengths:?}");
            }
        }
    }
}

#[test]
fn real_weights_give_the_golden_values() {
    if gpu() {
        golden(&CudaOptions { precision: Precision::Fp16, ..options() }, 0.999);
        golden(&CudaOptions { precision: Precision::Bf16, ..options() }, 0.99);
    }
}

/// all-MiniLM-L6-v2 in the folder `RINGBACK_MODEL`, else where tools/setup puts it: cosine to fp32 and the known
/// cosines of three sentences.
pub(super) fn golden(options: &CudaOptions, least: f64) {
    let folder =
        std::env::var_os("RINGBACK_MODEL").map_or_else(|| tool("models/all-MiniLM-L6-v2"), PathBuf::from);
    let Some(folder) = need(folder.is_dir().then_some(folder), "all-MiniLM-L6-v2", "run tools/setup model")
    else {
        return;
    };
    let model = Model::open(&folder, Task::Embed, OpenOptions::default()).expect("a model");
    let mut batch = Batch::new();
    for text in ["A man is eating food.", "A man is eating a piece of bread.", "The girl is carrying a baby."]
    {
        let tokens = model.tokenizer().encode(&EncodeInput::Text(text.to_owned())).expect("tokens");
        batch.push(&tokens.ids, &tokens.type_ids, model.encoder().config.position_offset);
    }
    let wanted = models::on_cpu(model.encoder(), &batch);
    let mut engine = CudaEngine::load(model.encoder().clone(), options).expect("loaded");
    let found = models::run(&mut engine, &batch);
    for (found, wanted) in found.rows().zip(wanted.rows()) {
        let cosine = cosine(found, wanted);
        eprintln!("{:?}: cosine to fp32 {cosine:.6}", options.precision);
        assert!(cosine >= least, "{:?}: {cosine}", options.precision);
    }
    let rows: Vec<&[f32]> = found.rows().collect();
    let near = 10.0 * (1.0 - least);
    for (other, known) in [(1, 0.75534), (2, -0.10496)] {
        let cosine = cosine(rows[0], rows[other]);
        eprintln!("{:?}: sentences 0 and {other} {cosine:.5}, known {known}", options.precision);
        assert!((cosine - known).abs() < near, "{cosine} should be {known}");
    }
}
