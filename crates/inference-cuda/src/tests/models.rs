//! Tiny random models, batches for them, and the CPU engine's answer.

use super::random::Random;
use ringback_inference::{
    Batch, CpuEngine, CpuOptions, Encoder, Engine, Family, ModelConfig, Outputs, ProblemType, Task,
};
use std::sync::Arc;

/// Two layers, hidden size 64, heads of 32: the shape of [`super::engine::SHAPE`].
pub(super) fn tiny(task: Task, seed: u64) -> Encoder {
    let config = ModelConfig {
        family: Family::Bert,
        hidden_size: 64,
        intermediate_size: 136,
        num_hidden_layers: 2,
        num_attention_heads: 2,
        vocab_size: 300,
        max_position_embeddings: 512,
        type_vocab_size: 2,
        layer_norm_eps: 1e-12,
        position_offset: 0,
        labels: vec!["a".to_owned(), "b".to_owned(), "c".to_owned()],
        problem_type: ProblemType::SingleLabel,
    };
    Encoder::random(config, task, seed)
}

/// Random texts of these lengths.
pub(super) fn batch(encoder: &Encoder, random: &mut Random, lengths: &[usize]) -> Batch {
    let mut batch = Batch::new();
    for length in lengths {
        let ids: Vec<u32> = (0..*length).map(|_| random.below(encoder.config.vocab_size as u32)).collect();
        let types: Vec<u32> =
            (0..*length).map(|_| random.below(encoder.config.type_vocab_size as u32)).collect();
        batch.push(&ids, &types, encoder.config.position_offset);
    }
    batch
}

/// Submits one batch and waits for it.
pub(super) fn run(engine: &mut dyn Engine, batch: &Batch) -> Outputs {
    let mut outputs = Outputs::default();
    engine.submit(batch).expect("submitted");
    engine.collect(&mut outputs).expect("collected");
    outputs
}

/// What the CPU engine makes of a batch, in fp32.
pub(super) fn on_cpu(encoder: &Arc<Encoder>, batch: &Batch) -> Outputs {
    let options =
        CpuOptions { max_batch_tokens: batch.tokens().max(encoder.max_seq_len), ..CpuOptions::default() };
    let mut engine = CpuEngine::new(encoder.clone(), options).expect("a CPU engine");
    run(&mut engine, batch)
}
