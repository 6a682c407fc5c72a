//! Each kernel against the reference, on fresh random inputs.

use super::{
    random::Random,
    reference,
    rig::{Rig, RigExt},
};
use crate::{
    forward::{Arg, Gemm},
    input::{self, Shape},
    kernels::{self, Kernel},
    precision::Precision,
};
use ringback_inference::Batch;

/// Lengths around every edge of the attention's tiles.
pub(super) const LENGTHS: [usize; 14] = [1, 2, 15, 16, 17, 31, 33, 64, 65, 127, 128, 129, 511, 512];

/// `found` within `units` roundings of half precision of `wanted`, taken at a size of at least 1.
#[track_caller]
fn close(rig: &dyn Rig, what: &str, found: &[f32], wanted: &[f32], units: f32) {
    let unit = match rig.shape().precision {
        Precision::Fp16 => 0.5_f32.powi(11),
        Precision::Bf16 => 0.5_f32.powi(8),
    };
    near(what, found, wanted, units * unit);
}

#[track_caller]
fn near(what: &str, found: &[f32], wanted: &[f32], tolerance: f32) {
    assert_eq!(found.len(), wanted.len(), "{what}");
    for (at, (found, wanted)) in found.iter().zip(wanted).enumerate() {
        let most = tolerance * wanted.abs().max(1.0);
        assert!((found - wanted).abs() <= most, "{what}[{at}] is {found}, should be {wanted} within {most}");
    }
}

fn chunks(values: &[f32], width: usize) -> impl Iterator<Item = &[f32]> {
    values.chunks_exact(width)
}

pub(super) fn embedding(rig: &mut dyn Rig, random: &mut Random, rows: usize) {
    let hidden = rig.shape().hidden as usize;
    let (words, positions, types) = (50, 20, 2);
    let mut word = random.floats(words * hidden, 1.0);
    let mut position = random.floats(positions * hidden, 1.0);
    let mut kind = random.floats(types * hidden, 1.0);
    let (gamma, beta) = (random.floats(hidden, 2.0), random.floats(hidden, 1.0));
    let ids: Vec<u32> = (0..rows).map(|_| random.below(words as u32)).collect();
    let places: Vec<u32> =
        (0..rows).map(|_| random.below(positions as u32) | random.below(types as u32) << 16).collect();
    let out = rig.room_half(rows * hidden);
    let args = [
        Arg::Pointer(out),
        Arg::Pointer(rig.put_u32(&ids)),
        Arg::Pointer(rig.put_u32(&places)),
        Arg::Pointer(rig.put_half(&mut word)),
        Arg::Pointer(rig.put_half(&mut position)),
        Arg::Pointer(rig.put_half(&mut kind)),
        Arg::Pointer(rig.put_f32(&gamma)),
        Arg::Pointer(rig.put_f32(&beta)),
        Arg::F32(1e-12),
        Arg::U32(rows as u32),
    ];
    rig.launch(Kernel::EmbedLayerNorm, [kernels::blocks_of_rows(rows as u32), 1], &args);
    let found = rig.get_half(out, rows * hidden);
    for (row, found) in chunks(&found, hidden).enumerate() {
        let at = |table: &[f32], index: u32| table[index as usize * hidden..][..hidden].to_vec();
        let (a, b, c) =
            (at(&word, ids[row]), at(&position, places[row] & 0xffff), at(&kind, places[row] >> 16));
        let sum: Vec<f32> = (0..hidden).map(|i| a[i] + b[i] + c[i]).collect();
        close(rig, "embedding", found, &reference::layer_norm(&sum, &gamma, &beta, 1e-12), 2.0);
    }
}

pub(super) fn residual_norm(rig: &mut dyn Rig, random: &mut Random, rows: usize) {
    let hidden = rig.shape().hidden as usize;
    let (mut x, mut residual) = (random.floats(rows * hidden, 3.0), random.floats(rows * hidden, 3.0));
    let bias = random.floats(hidden, 1.0);
    // A row far from zero: a variance by the difference of squares would lose it.
    x[..hidden].iter_mut().for_each(|x| *x += 100.0);
    let (gamma, beta) = (random.floats(hidden, 2.0), random.floats(hidden, 1.0));
    let x_at = rig.put_half(&mut x);
    let residual_at = rig.put_half(&mut residual);
    let args = [
        Arg::Pointer(residual_at),
        Arg::Pointer(x_at),
        Arg::Pointer(residual_at),
        Arg::Pointer(rig.put_f32(&bias)),
        Arg::Pointer(rig.put_f32(&gamma)),
        Arg::Pointer(rig.put_f32(&beta)),
        Arg::F32(1e-5),
        Arg::U32(rows as u32),
    ];
    rig.launch(Kernel::ResidualLayerNorm, [kernels::blocks_of_rows(rows as u32), 1], &args);
    let found = rig.get_half(residual_at, rows * hidden);
    for (row, found) in chunks(&found, hidden).enumerate() {
        let sum: Vec<f32> =
            (0..hidden).map(|i| x[row * hidden + i] + residual[row * hidden + i] + bias[i]).collect();
        close(rig, "layer norm", found, &reference::layer_norm(&sum, &gamma, &beta, 1e-5), 2.0);
    }
}

pub(super) fn gelu(rig: &mut dyn Rig, random: &mut Random, rows: usize) {
    let width = rig.shape().intermediate as usize;
    let mut x = random.floats(rows * width, 5.0);
    let bias = random.floats(width, 1.0);
    let at = rig.put_half(&mut x);
    let args = [Arg::Pointer(at), Arg::Pointer(rig.put_f32(&bias)), Arg::U32(rows as u32)];
    rig.launch(Kernel::BiasGelu, [kernels::blocks_of_packs(rows as u32, width as u32), 1], &args);
    let wanted: Vec<f32> = x.iter().enumerate().map(|(i, x)| reference::gelu(x + bias[i % width])).collect();
    let found = rig.get_half(at, rows * width);
    close(rig, "gelu", &found, &wanted, 1.01);
}

/// Texts of these lengths end to end; `packed` has been laid out as for the engine.
fn texts(lengths: &[usize]) -> (Batch, Shape, Vec<u32>) {
    let mut batch = Batch::new();
    for length in lengths {
        batch.push(&vec![0; *length], &vec![0; *length], 0);
    }
    let shape = Shape::of(&batch);
    let mut words = vec![0; shape.words()];
    input::pack(&batch, shape, &mut words);
    (batch, shape, words)
}

pub(super) fn attention(rig: &mut dyn Rig, random: &mut Random, lengths: &[usize], sharpness: f32) {
    let kernel_shape = rig.shape();
    let (hidden, head_dim) = (kernel_shape.hidden as usize, kernel_shape.head_dim as usize);
    let (batch, shape, words) = texts(lengths);
    let rows = shape.tokens as usize;
    let mut qkv = random.floats(rows * 3 * hidden, sharpness);
    // What padding and neighbours hold must not matter: rows behind the last text are the largest numbers there are.
    qkv[batch.tokens() * 3 * hidden..].fill(60_000.0);
    let qkv_at = rig.put_half(&mut qkv);
    let out = rig.room_half(rows * hidden);
    let scale = std::f32::consts::LOG2_E / (head_dim as f32).sqrt();
    let args = [
        Arg::Pointer(out),
        Arg::Pointer(qkv_at),
        Arg::Pointer(rig.put_u32(&words[shape.starts_at()..shape.tiles_at()])),
        Arg::Pointer(rig.put_u32(&words[shape.tiles_at()..])),
        Arg::F32(scale),
    ];
    rig.launch(Kernel::Attention, [shape.tiles, kernel_shape.heads()], &args);
    let found = rig.get_half(out, rows * hidden);
    for range in batch.ranges() {
        for head in 0..kernel_shape.heads() as usize {
            let wanted = reference::attention(
                &qkv[range.start * 3 * hidden..range.end * 3 * hidden],
                hidden,
                head,
                head_dim,
            );
            for (row, wanted) in wanted.iter().enumerate() {
                let found = &found[(range.start + row) * hidden + head * head_dim..][..head_dim];
                let what = format!("attention of {} keys, query {row}, head {head}", range.len());
                // Each share is rounded once, so the error is bounded by the largest value, not by their sum.
                close(rig, &what, found, wanted, 3.0 * sharpness);
            }
        }
    }
    assert!(
        found[batch.tokens() * hidden..].iter().all(|x| x.is_nan()),
        "rows behind the last text stay untouched"
    );
}

pub(super) fn pooling(rig: &mut dyn Rig, random: &mut Random, lengths: &[usize]) {
    let hidden = rig.shape().hidden as usize;
    let (batch, shape, words) = texts(lengths);
    let mut rows = random.floats(shape.tokens as usize * hidden, 2.0);
    let rows_at = rig.put_half(&mut rows);
    let starts = rig.put_u32(&words[shape.starts_at()..shape.tiles_at()]);
    for flags in 0..4 {
        let out = rig.room_f32(shape.sequences as usize * hidden);
        let args = [Arg::Pointer(out), Arg::Pointer(rows_at), Arg::Pointer(starts), Arg::U32(flags)];
        rig.launch(Kernel::Pool, [shape.sequences, 1], &args);
        let found = rig.get_f32(out, shape.sequences as usize * hidden);
        for (range, found) in batch.ranges().zip(chunks(&found, hidden)) {
            let text = &rows[range.start * hidden..range.end * hidden];
            let mut wanted: Vec<f32> = if flags & kernels::POOL_FIRST != 0 {
                text[..hidden].to_vec()
            } else {
                (0..hidden)
                    .map(|i| chunks(text, hidden).map(|row| row[i]).sum::<f32>() / range.len() as f32)
                    .collect()
            };
            if flags & kernels::POOL_NORMALISE != 0 {
                wanted = reference::normalised(&wanted);
            }
            near("pooling", found, &wanted, 2e-5);
        }
        let padding = &found[batch.sequences() * hidden..];
        assert!(padding.iter().all(|x| *x == 0.0), "texts without rows give zeros");
    }
}

pub(super) fn classifier(rig: &mut dyn Rig, random: &mut Random, lengths: &[usize], labels: usize) {
    let hidden = rig.shape().hidden as usize;
    let (batch, shape, words) = texts(lengths);
    let mut rows = random.floats(shape.tokens as usize * hidden, 1.0);
    let scale = (3.0 / hidden as f32).sqrt();
    let (mut dense, mut last) =
        (random.floats(hidden * hidden, scale), random.floats(labels * hidden, scale));
    let (dense_bias, last_bias) = (random.floats(hidden, 1.0), random.floats(labels, 1.0));
    let out = rig.room_f32(shape.sequences as usize * labels);
    let args = [
        Arg::Pointer(out),
        Arg::Pointer(rig.put_half(&mut rows)),
        Arg::Pointer(rig.put_u32(&words[shape.starts_at()..shape.tiles_at()])),
        Arg::Pointer(rig.put_half(&mut dense)),
        Arg::Pointer(rig.put_f32(&dense_bias)),
        Arg::Pointer(rig.put_half(&mut last)),
        Arg::Pointer(rig.put_f32(&last_bias)),
        Arg::U32(labels as u32),
    ];
    rig.launch(Kernel::Classify, [shape.sequences, 1], &args);
    let found = rig.get_f32(out, shape.sequences as usize * labels);
    for (range, found) in batch.ranges().zip(chunks(&found, labels)) {
        let first = &rows[range.start * hidden..][..hidden];
        let inner: Vec<f32> =
            reference::linear(&dense, &dense_bias, first).into_iter().map(f32::tanh).collect();
        near("logits", found, &reference::linear(&last, &last_bias, &inner), 1e-5);
    }
    let padding = &found[batch.sequences() * labels..];
    assert!(padding.iter().all(|x| *x == 0.0), "texts without rows give zeros");
}

/// A product with and without bias: for cublasLt the check of layouts and orders, for the emulator that of itself.
pub(super) fn product(rig: &mut dyn Rig, random: &mut Random, rows: u32, outputs: u32, inputs: u32) {
    let scale = (3.0 / inputs as f32).sqrt();
    let mut x = random.floats((rows * inputs) as usize, 1.0);
    let mut weight = random.floats((outputs * inputs) as usize, scale);
    let mut bias = random.floats(outputs as usize, 1.0);
    let (x_at, weight_at, bias_at) =
        (rig.put_half(&mut x), rig.put_half(&mut weight), rig.put_half(&mut bias));
    for with_bias in [false, true] {
        let y = rig.room_half((rows * outputs) as usize);
        let bias_at = with_bias.then_some(bias_at);
        rig.gemm(Gemm { rows, outputs, inputs, y, x: x_at, weight: weight_at, bias: bias_at });
        let found = rig.get_half(y, (rows * outputs) as usize);
        let none = vec![0.0; outputs as usize];
        for (row, found) in chunks(&found, outputs as usize).enumerate() {
            let x = &x[row * inputs as usize..][..inputs as usize];
            let wanted = reference::linear(&weight, if with_bias { &bias } else { &none }, x);
            close(rig, "product", found, &wanted, 2.0);
        }
    }
}
