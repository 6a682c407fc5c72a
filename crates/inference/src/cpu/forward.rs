//! One batch through all layers.
//!
//! The tokens of a batch are cut into runs of rows, whatever sequences they belong to. A thread carries its run through
//! a whole layer, so that its activations stay in its cache; only keys and values are read across runs, hence one
//! meeting of all threads per layer. Queries, keys and values of the next layer go into a second buffer meanwhile.

use super::{
    aligned::Aligned,
    attention::{Attention, Scratch},
    gemm::{Finish, Packed, Product},
    math::LayerNormRows,
};
use crate::{
    batch::Batch,
    encoder::Encoder,
    weights::{LayerNorm, Linear},
};
use pulp::Arch;
use rayon::{ThreadPool, prelude::*};
use std::{ops::Range, sync::Arc};

/// Fewest rows per run: below, reading the weights costs more than the arithmetic.
const FEWEST_ROWS: usize = 32;
/// Most rows per run: their activations and a panel of weights fit into a core's second cache.
const MOST_ROWS: usize = 128;
/// Runs begin at multiples of this, the rows of a tile.
const ROW_STEP: usize = 8;

/// A layer with its weights packed.
struct Layer {
    qkv: Packed,
    attention_output: Packed,
    intermediate: Packed,
    output: Packed,
}

/// A packed model and the memory of one batch.
pub(super) struct Forward {
    encoder: Arc<Encoder>,
    arch: Arch,
    layers: Vec<Layer>,
    pool: Option<ThreadPool>,
    threads: usize,
    hidden: Aligned,
    qkv: Aligned,
    next_qkv: Aligned,
    runs: Vec<Run>,
}

/// Memory of a run of rows.
#[derive(Default)]
struct Run {
    rows: Range<usize>,
    /// The sequences that the rows belong to.
    sequences: Vec<Range<usize>>,
    context: Aligned,
    intermediate: Aligned,
    attention: Scratch,
}

/// What one thread works on: a run and its rows of the shared buffers.
struct Part<'a> {
    run: &'a mut Run,
    hidden: &'a mut [f32],
    qkv: &'a mut [f32],
}

impl Forward {
    pub(super) fn new(encoder: Arc<Encoder>, arch: Arch, pool: Option<ThreadPool>) -> Self {
        let lanes = super::gemm::lanes(arch);
        let pack = |part: &Linear| Packed::new(&part.weight, &part.bias, part.in_features, lanes);
        let (width, scale) = (encoder.config.hidden_size, 1.0 / (encoder.config.head_size() as f32).sqrt());
        let layers = encoder
            .weights
            .layers
            .iter()
            .map(|layer| {
                // The queries carry the scale of the attention.
                let mut qkv = layer.qkv.clone();
                qkv.weight[..width * width].iter_mut().for_each(|value| *value *= scale);
                qkv.bias[..width].iter_mut().for_each(|value| *value *= scale);
                Layer {
                    qkv: pack(&qkv),
                    attention_output: pack(&layer.attention_output),
                    intermediate: pack(&layer.intermediate),
                    output: pack(&layer.output),
                }
            })
            .collect();
        let threads = pool.as_ref().map_or(1, ThreadPool::current_num_threads);
        Self {
            encoder,
            arch,
            layers,
            pool,
            threads,
            hidden: Aligned::default(),
            qkv: Aligned::default(),
            next_qkv: Aligned::default(),
            runs: Vec::new(),
        }
    }

    /// The last layer's vectors, `[tokens][hidden]`. The batch has been checked.
    pub(super) fn run(&mut self, batch: &Batch) -> &[f32] {
        let tokens = batch.tokens();
        let width = self.encoder.config.hidden_size;
        self.hidden.resize(tokens * width);
        self.qkv.resize(tokens * 3 * width);
        self.next_qkv.resize(tokens * 3 * width);
        let rows = self.cut(batch);
        let step = Step { encoder: &self.encoder, arch: self.arch, batch };
        let pool = self.pool.as_ref().filter(|_| self.runs.len() > 1);
        let layers = &self.layers;
        each(pool, &mut self.runs, self.hidden.get_mut(), self.qkv.get_mut(), rows, |part| {
            step.embed(part.run.rows.clone(), part.hidden);
            step.product(part.hidden, &layers[0].qkv, part.qkv, Finish::Store);
        });
        for index in 0..layers.len() {
            let qkv = self.qkv.get();
            let next = layers.get(index + 1);
            each(pool, &mut self.runs, self.hidden.get_mut(), self.next_qkv.get_mut(), rows, |part| {
                step.layer(index, &layers[index], qkv, part.run, part.hidden);
                if let Some(next) = next {
                    step.product(part.hidden, &next.qkv, part.qkv, Finish::Store);
                }
            });
            std::mem::swap(&mut self.qkv, &mut self.next_qkv);
        }
        self.hidden.get()
    }

    /// Divides the rows among runs; answers rows per run.
    fn cut(&mut self, batch: &Batch) -> usize {
        let tokens = batch.tokens();
        // A multiple of the threads, as few as the largest run allows.
        let rounds = tokens.div_ceil(MOST_ROWS * self.threads);
        let rows = tokens.div_ceil(rounds * self.threads).max(FEWEST_ROWS).next_multiple_of(ROW_STEP);
        let count = tokens.div_ceil(rows);
        self.runs.resize_with(count, Run::default);
        let mut sequences = batch.ranges().peekable();
        for (index, run) in self.runs.iter_mut().enumerate() {
            run.rows = index * rows..tokens.min((index + 1) * rows);
            run.sequences.clear();
            while let Some(sequence) = sequences.peek() {
                if sequence.start >= run.rows.end {
                    break;
                }
                run.sequences.push(sequence.clone());
                if sequence.end > run.rows.end {
                    break;
                }
                sequences.next();
            }
        }
        rows
    }
}

/// Does `work` for each run, on the pool's threads if there are several.
fn each(
    pool: Option<&ThreadPool>,
    runs: &mut [Run],
    hidden: &mut [f32],
    qkv: &mut [f32],
    rows: usize,
    work: impl Fn(Part<'_>) + Sync,
) {
    let tokens = runs.last().map_or(0, |run| run.rows.end);
    let width = hidden.len() / tokens.max(1);
    let (hidden_step, qkv_step) = (rows * width, rows * 3 * width);
    match pool {
        None => {
            let parts = runs.iter_mut().zip(hidden.chunks_mut(hidden_step)).zip(qkv.chunks_mut(qkv_step));
            parts.for_each(|((run, hidden), qkv)| work(Part { run, hidden, qkv }));
        }
        Some(pool) => pool.install(|| {
            runs.par_iter_mut()
                .zip(hidden.par_chunks_mut(hidden_step))
                .zip(qkv.par_chunks_mut(qkv_step))
                .for_each(|((run, hidden), qkv)| work(Part { run, hidden, qkv }));
        }),
    }
}

/// The steps of a layer for some rows.
struct Step<'a> {
    encoder: &'a Encoder,
    arch: Arch,
    batch: &'a Batch,
}

impl Step<'_> {
    fn embed(&self, rows: Range<usize>, hidden: &mut [f32]) {
        let weights = &self.encoder.weights;
        let width = self.encoder.config.hidden_size;
        let row = |table: &'_ [f32], id: u32| -> Range<usize> {
            let start = id as usize * width;
            debug_assert!(start < table.len());
            start..start + width
        };
        let batch = self.batch;
        for (token, out) in rows.zip(hidden.chunks_exact_mut(width)) {
            let word = &weights.word_embeddings[row(&weights.word_embeddings, batch.input_ids[token])];
            let place =
                &weights.position_embeddings[row(&weights.position_embeddings, batch.position_ids[token])];
            let segment = &weights.token_type_embeddings
                [row(&weights.token_type_embeddings, batch.token_type_ids[token])];
            for (((out, word), place), segment) in out.iter_mut().zip(word).zip(place).zip(segment) {
                *out = word + segment + place;
            }
        }
        self.norm(hidden, &weights.embedding_norm);
    }

    fn layer(&self, index: usize, layer: &Layer, qkv: &[f32], run: &mut Run, hidden: &mut [f32]) {
        let config = &self.encoder.config;
        let weights = &self.encoder.weights.layers[index];
        let rows = run.rows.len();
        run.context.resize(rows * config.hidden_size);
        self.arch.dispatch(Attention {
            qkv,
            sequences: &run.sequences,
            rows: run.rows.clone(),
            context: run.context.get_mut(),
            heads: config.num_attention_heads,
            head_size: config.head_size(),
            scratch: &mut run.attention,
        });
        self.product(run.context.get(), &layer.attention_output, hidden, Finish::Add);
        self.norm(hidden, &weights.attention_norm);
        run.intermediate.resize(rows * config.intermediate_size);
        self.product(hidden, &layer.intermediate, run.intermediate.get_mut(), Finish::Gelu);
        self.product(run.intermediate.get(), &layer.output, hidden, Finish::Add);
        self.norm(hidden, &weights.output_norm);
    }

    fn product(&self, a: &[f32], weights: &Packed, c: &mut [f32], finish: Finish) {
        self.arch.dispatch(Product { a, weights, c, finish });
    }

    fn norm(&self, rows: &mut [f32], norm: &LayerNorm) {
        let (gamma, beta, eps) = (&norm.gamma, &norm.beta, self.encoder.config.layer_norm_eps);
        self.arch.dispatch(LayerNormRows { rows, gamma, beta, eps });
    }
}
