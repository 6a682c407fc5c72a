//! The functions against double precision, and all instruction sets of this machine against the plainest.

use super::{CpuEngine, CpuOptions, gemm, math};
use crate::{
    batch::{Batch, Outputs},
    config::{Family, ModelConfig, ProblemType},
    encoder::{Encoder, Pooling, Task},
    engine::{Engine, EngineError},
};
use pulp::{Arch, Simd, WithSimd};
use std::sync::Arc;

/// Whatever this machine can do, the plainest first.
fn archs() -> Vec<Arch> {
    let mut all = vec![Arch::Scalar];
    #[cfg(target_arch = "x86_64")]
    {
        all.extend(pulp::x86::V3::try_new().map(Arch::V3));
        all.extend(pulp::x86::V4::try_new().map(Arch::V4));
    }
    #[cfg(target_arch = "aarch64")]
    all.push(Arch::new());
    all
}

#[derive(Clone, Copy)]
enum Function {
    Exp,
    Erf,
    Gelu,
}

struct Apply<'a>(Function, &'a mut [f32]);

impl WithSimd for Apply<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        for vector in S::as_mut_simd_f32s(self.1).0 {
            *vector = match self.0 {
                Function::Exp => math::exp(simd, *vector),
                Function::Erf => math::erf(simd, *vector),
                Function::Gelu => math::gelu(simd, *vector),
            };
        }
    }
}

/// erf by its series, in double precision; good to 1e-13 within ±4.5.
fn erf(x: f64) -> f64 {
    let (mut term, mut sum, mut n) = (x, x, 0.0);
    while term.abs() > 1e-18 {
        n += 1.0;
        term *= -x * x / n;
        sum += term / (2.0 * n + 1.0);
    }
    sum * 2.0 / std::f64::consts::PI.sqrt()
}

fn worst(arch: Arch, function: Function, from: f32, to: f32, off: impl Fn(f32, f32) -> f64) -> f64 {
    const STEPS: usize = 1 << 16;
    let inputs: Vec<f32> =
        (0..=STEPS).map(|step| from + (to - from) * step as f32 / STEPS as f32).take(STEPS).collect();
    let mut outputs = inputs.clone();
    arch.dispatch(Apply(function, &mut outputs));
    inputs.iter().zip(&outputs).map(|(input, output)| off(*input, *output)).fold(0.0, f64::max)
}

#[test]
fn functions_are_exact_to_a_few_millionths() {
    for arch in archs() {
        let exp = worst(arch, Function::Exp, -87.0, 87.0, |x, y| {
            let exact = f64::from(x).exp();
            ((f64::from(y) - exact) / exact).abs()
        });
        assert!(exp < 3e-7, "{arch:?}: exp is off by {exp}");
        let erf_off = worst(arch, Function::Erf, -4.5, 4.5, |x, y| (f64::from(y) - erf(f64::from(x))).abs());
        assert!(erf_off < 4e-7, "{arch:?}: erf is off by {erf_off}");
        let gelu = worst(arch, Function::Gelu, -6.0, 6.0, |x, y| {
            let x = f64::from(x);
            (f64::from(y) - 0.5 * x * (1.0 + erf(x * std::f64::consts::FRAC_1_SQRT_2))).abs()
        });
        assert!(gelu < 2e-6, "{arch:?}: gelu is off by {gelu}");
    }
}

#[test]
fn functions_stay_finite_far_out() {
    for arch in archs() {
        for (function, input, expected) in [
            (Function::Exp, -1e30, 0.0),
            (Function::Exp, f32::MIN, 0.0),
            (Function::Erf, 50.0, 1.0),
            (Function::Erf, -1e20, -1.0),
            (Function::Gelu, 1e4, 1e4),
            (Function::Gelu, -1e4, 0.0),
        ] {
            let mut values = [input; 16];
            arch.dispatch(Apply(function, &mut values));
            let off = (values[0] - expected).abs() / expected.abs().max(1.0);
            assert!(off < 2e-3, "{arch:?}: {input} gives {}", values[0]);
        }
    }
}

fn product(arch: Arch, m: usize, n: usize, k: usize) {
    let number = |index: usize| ((index * 2_654_435_761) % 1_000) as f32 / 500.0 - 1.0;
    let a: Vec<f32> = (0..m * k).map(number).collect();
    let weight: Vec<f32> = (0..n * k).map(|index| number(index + 7)).collect();
    let bias: Vec<f32> = (0..n).map(|index| number(index + 3)).collect();
    let packed = gemm::Packed::new(&weight, &bias, k, gemm::lanes(arch));
    for finish in [gemm::Finish::Store, gemm::Finish::Add, gemm::Finish::Gelu] {
        let before: Vec<f32> = (0..m * n).map(|index| number(index + 1)).collect();
        let mut c = before.clone();
        arch.dispatch(gemm::Product { a: &a, weights: &packed, c: &mut c, finish });
        for row in 0..m {
            for column in 0..n {
                let dot: f64 =
                    (0..k).map(|i| f64::from(a[row * k + i]) * f64::from(weight[column * k + i])).sum();
                let sum = dot + f64::from(bias[column]);
                let exact = match finish {
                    gemm::Finish::Store => sum,
                    gemm::Finish::Add => sum + f64::from(before[row * n + column]),
                    gemm::Finish::Gelu => {
                        0.5 * sum * (1.0 + erf((sum * std::f64::consts::FRAC_1_SQRT_2).clamp(-4.5, 4.5)))
                    }
                };
                let off = (f64::from(c[row * n + column]) - exact).abs();
                assert!(off < 1e-4, "{arch:?} {m}x{n}x{k} {finish:?} [{row}][{column}]: off by {off}");
            }
        }
    }
}

#[test]
fn products_of_any_shape_are_right() {
    for arch in archs() {
        for (m, n, k) in
            [(1, 1, 1), (3, 5, 7), (8, 48, 64), (9, 49, 33), (13, 100, 48), (31, 17, 5), (16, 80, 100)]
        {
            product(arch, m, n, k);
        }
    }
}

fn config(hidden: usize, heads: usize) -> ModelConfig {
    ModelConfig {
        family: Family::Bert,
        hidden_size: hidden,
        intermediate_size: 2 * hidden + 3,
        num_hidden_layers: 3,
        num_attention_heads: heads,
        vocab_size: 50,
        max_position_embeddings: 150,
        type_vocab_size: 2,
        layer_norm_eps: 1e-12,
        position_offset: 0,
        labels: vec!["a".to_owned(), "b".to_owned()],
        problem_type: ProblemType::SingleLabel,
    }
}

fn batch(lengths: &[usize]) -> Batch {
    let mut batch = Batch::new();
    for (index, length) in lengths.iter().enumerate() {
        let ids: Vec<u32> = (0..*length).map(|token| ((index * 31 + token * 17) % 50) as u32).collect();
        let types: Vec<u32> = (0..*length).map(|token| u32::from(token > length / 2)).collect();
        batch.push(&ids, &types, 0);
    }
    batch
}

fn rows(encoder: &Arc<Encoder>, threads: usize, arch: Arch, batch: &Batch) -> Outputs {
    let options = CpuOptions { threads, ..CpuOptions::default() };
    let mut engine = CpuEngine::with_arch(Arc::clone(encoder), options, arch).expect("an engine");
    let mut outputs = Outputs::default();
    // Twice: what the first batch left in the buffers must not matter.
    for _ in 0..2 {
        engine.submit(batch).expect("a batch");
        engine.collect(&mut outputs).expect("rows");
    }
    outputs
}

#[test]
fn instruction_sets_threads_and_company_do_not_matter() {
    let lengths = [150, 1, 37, 64, 2, 149, 8, 9, 100, 1, 1, 63];
    for (hidden, heads, task, pooling) in [
        (64, 2, Task::Embed, Pooling::Mean),
        (78, 3, Task::Embed, Pooling::Cls),
        (40, 8, Task::Classify, Pooling::Mean),
    ] {
        let mut encoder = Encoder::random(config(hidden, heads), task, 11);
        encoder.pooling = pooling;
        let encoder = Arc::new(encoder);
        let all = batch(&lengths);
        let plain = rows(&encoder, 1, Arch::Scalar, &all);
        assert_eq!(plain.width, if task == Task::Embed { hidden } else { 2 });
        for arch in archs() {
            for threads in [1, 2, 5] {
                let same = rows(&encoder, threads, arch, &all);
                let off =
                    plain.values.iter().zip(&same.values).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                assert!(off < 1e-4, "{hidden}/{heads} {arch:?} {threads} threads: off by {off}");
            }
        }
        // Each sequence alone gives the row that it has in company.
        for (range, row) in all.ranges().zip(plain.rows()) {
            let mut alone = Batch::new();
            alone.push(&all.input_ids[range.clone()], &all.token_type_ids[range], 0);
            let own = rows(&encoder, 1, Arch::new(), &alone);
            let off = row.iter().zip(&own.values).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(off < 1e-4, "off by {off}");
        }
    }
}

#[test]
fn batches_beyond_the_limits_are_refused_by_name() {
    let encoder = Arc::new(Encoder::random(config(32, 2), Task::Embed, 1));
    let options = CpuOptions { threads: 1, max_batch_tokens: 200, max_batch_sequences: 3 };
    let mut engine = CpuEngine::new(Arc::clone(&encoder), options).expect("an engine");
    engine.warm_up().expect("the largest batch runs");
    engine.health().expect("it works");
    let mut refused = |batch: &Batch| match engine.submit(batch) {
        Err(EngineError::Rejected { detail }) => detail,
        other => panic!("{other:?}"),
    };
    assert_eq!(refused(&batch(&[150, 51])), "it has 201 tokens, the engine takes at most 200");
    assert_eq!(refused(&batch(&[1, 1, 1, 1])), "it has 4 sequences, the engine takes at most 3");
    assert_eq!(refused(&Batch::new()), "cu_seq_lens must begin with 0 and hold at least one sequence");
    assert_eq!(refused(&batch(&[151])), "sequence 0 has 151 tokens, 1 to 150 are allowed");
    let mut wrong = batch(&[5]);
    wrong.input_ids[3] = 50;
    assert_eq!(refused(&wrong), "input_ids[3] is 50, it must be below 50");
    let mut wrong = batch(&[5]);
    wrong.token_type_ids.pop();
    assert_eq!(refused(&wrong), "token_type_ids has 4 entries, input_ids 5");
    assert!(engine.collect(&mut Outputs::default()).is_err(), "nothing was submitted");
    let small = CpuOptions { max_batch_tokens: 149, ..CpuOptions::default() };
    assert!(CpuEngine::new(encoder, small).is_err(), "a batch must hold the longest sequence");
}

#[test]
fn a_result_that_is_no_number_is_an_error() {
    let mut encoder = Encoder::random(config(32, 2), Task::Embed, 1);
    encoder.weights.word_embeddings[49 * 32] = f32::INFINITY;
    let mut engine = CpuEngine::new(Arc::new(encoder), CpuOptions::default()).expect("an engine");
    let mut both = Batch::new();
    both.push(&[1, 2], &[0, 0], 0);
    both.push(&[1, 49], &[0, 0], 0);
    engine.submit(&both).expect("a batch");
    assert_eq!(engine.collect(&mut Outputs::default()), Err(EngineError::NotFinite { sequence: 1 }));
}
