//! Attention over sequences that lie end to end: each looks at itself only, no mask, no padding.

use super::{aligned::Aligned, gemm::tile, math};
use pulp::{Simd, WithSimd};
use std::ops::Range;

/// Memory of one thread for one head of one sequence.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    /// Keys, transposed, in panels: for each panel of keys, for every dimension the panel's keys side by side.
    keys: Aligned,
    /// Values in panels of the head's dimensions.
    values: Aligned,
    /// Scores of a block of queries.
    scores: Aligned,
}

/// The attention of the rows `rows` of a batch, all heads. The queries carry the scale already.
pub(super) struct Attention<'a> {
    /// Query, key and value of every token of the batch, `[tokens][3 * hidden]`.
    pub(super) qkv: &'a [f32],
    /// First and last row of each sequence that `rows` touches.
    pub(super) sequences: &'a [Range<usize>],
    /// The rows to compute.
    pub(super) rows: Range<usize>,
    /// `[rows][hidden]`.
    pub(super) context: &'a mut [f32],
    pub(super) heads: usize,
    pub(super) head_size: usize,
    pub(super) scratch: &'a mut Scratch,
}

/// Vectors per panel of keys and of dimensions.
const PANEL: usize = 2;
/// Queries per block.
const BLOCK: usize = 8;

impl WithSimd for Attention<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let hidden = self.heads * self.head_size;
        for sequence in self.sequences {
            let first = sequence.start.max(self.rows.start);
            let last = sequence.end.min(self.rows.end);
            let tokens = &self.qkv[sequence.start * 3 * hidden..sequence.end * 3 * hidden];
            let queries = &self.qkv[first * 3 * hidden..last * 3 * hidden];
            let context =
                &mut self.context[(first - self.rows.start) * hidden..(last - self.rows.start) * hidden];
            for head in 0..self.heads {
                let one = Head { hidden, size: self.head_size, column: head * self.head_size };
                one.attend(simd, tokens, queries, context, self.scratch);
            }
        }
    }
}

/// Keys and values of one head of one sequence, in panels.
#[derive(Clone, Copy)]
struct PackedHead<'a> {
    keys: &'a [f32],
    values: &'a [f32],
    /// Tokens of the sequence.
    length: usize,
}

#[derive(Clone, Copy)]
struct Head {
    hidden: usize,
    size: usize,
    column: usize,
}

impl Head {
    #[inline(always)]
    fn attend<S: Simd>(
        self,
        simd: S,
        tokens: &[f32],
        queries: &[f32],
        context: &mut [f32],
        scratch: &mut Scratch,
    ) {
        let width = 3 * self.hidden;
        let length = tokens.len() / width;
        let padded = length.next_multiple_of(S::F32_LANES);
        self.pack_keys::<S>(tokens, padded, &mut scratch.keys);
        self.pack_values::<S>(tokens, length, &mut scratch.values);
        scratch.scores.resize(BLOCK * padded);
        let packed = PackedHead { keys: scratch.keys.get(), values: scratch.values.get(), length };
        let scores = scratch.scores.get_mut();
        let blocks = queries.chunks(BLOCK * width).zip(context.chunks_mut(BLOCK * self.hidden));
        for (queries, context) in blocks {
            if queries.len() == BLOCK * width {
                if S::REGISTER_COUNT >= 32 {
                    self.block::<S, BLOCK>(simd, queries, packed, scores, context);
                } else {
                    let (first, second) = context.split_at_mut(BLOCK / 2 * self.hidden);
                    let (upper, lower) = queries.split_at(BLOCK / 2 * width);
                    self.block::<S, 4>(simd, upper, packed, scores, first);
                    self.block::<S, 4>(simd, lower, packed, scores, second);
                }
            } else {
                let single = queries.chunks_exact(width).zip(context.chunks_exact_mut(self.hidden));
                for (query, context) in single {
                    self.block::<S, 1>(simd, query, packed, scores, context);
                }
            }
        }
    }

    /// `M` queries against all keys, softmax, times the values.
    #[inline(always)]
    fn block<S: Simd, const M: usize>(
        self,
        simd: S,
        queries: &[f32],
        packed: PackedHead<'_>,
        scores: &mut [f32],
        context: &mut [f32],
    ) {
        let PackedHead { keys, values, length } = packed;
        let width = 3 * self.hidden;
        let padded = length.next_multiple_of(S::F32_LANES);
        let scores = &mut scores[..M * padded];
        let rows: [&[f32]; M] = std::array::from_fn(|row| {
            &queries[row * width + self.column..row * width + self.column + self.size]
        });
        let panel_keys = PANEL * S::F32_LANES;
        for (panel, start) in keys.chunks(panel_keys * self.size).zip((0..padded).step_by(panel_keys)) {
            let (panel, _) = S::as_simd_f32s(panel);
            if panel.len() == PANEL * self.size {
                let sums = tile::<S, M, PANEL>(simd, rows, panel.as_chunks().0);
                write::<S, M, PANEL>(simd, &sums, &mut scores[start..], padded);
            } else {
                let sums = tile::<S, M, 1>(simd, rows, panel.as_chunks().0);
                write::<S, M, 1>(simd, &sums, &mut scores[start..], padded);
            }
        }
        let mut scales = [0.0; M];
        for (scale, row) in scales.iter_mut().zip(scores.chunks_exact_mut(padded)) {
            *scale = math::softmax(simd, row, length);
        }
        let rows: [&[f32]; M] = std::array::from_fn(|row| &scores[row * padded..row * padded + length]);
        let panel_size = PANEL * S::F32_LANES;
        let panels = values.chunks(panel_size * length).zip((0..self.size).step_by(panel_size));
        for (panel, start) in panels {
            let (panel, _) = S::as_simd_f32s(panel);
            let size = panel_size.min(self.size - start);
            let place = &mut context[self.column + start..];
            if panel.len() == PANEL * length {
                let sums = tile::<S, M, PANEL>(simd, rows, panel.as_chunks().0);
                self.write_scaled::<S, M, PANEL>(simd, &sums, &scales, place, size);
            } else {
                let sums = tile::<S, M, 1>(simd, rows, panel.as_chunks().0);
                self.write_scaled::<S, M, 1>(simd, &sums, &scales, place, size);
            }
        }
    }

    #[inline(always)]
    fn write_scaled<S: Simd, const M: usize, const V: usize>(
        self,
        simd: S,
        sums: &[[S::f32s; V]; M],
        scales: &[f32; M],
        context: &mut [f32],
        size: usize,
    ) {
        for ((sums, scale), row) in sums.iter().zip(scales).zip(context.chunks_mut(self.hidden)) {
            let scale = simd.splat_f32s(*scale);
            for (sum, part) in sums.iter().zip(row[..size].chunks_mut(S::F32_LANES)) {
                let value = simd.mul_f32s(*sum, scale);
                if let [whole] = S::as_mut_simd_f32s(part).0 {
                    *whole = value;
                } else {
                    simd.partial_store_f32s(part, value);
                }
            }
        }
    }

    #[inline(always)]
    fn pack_keys<S: Simd>(self, tokens: &[f32], padded: usize, keys: &mut Aligned) {
        keys.resize(padded * self.size);
        let panel_keys = PANEL * S::F32_LANES;
        let width = 3 * self.hidden;
        let panels = keys.get_mut().chunks_mut(panel_keys * self.size);
        for (panel, tokens) in panels.zip(tokens.chunks(panel_keys * width)) {
            let across = panel.len() / self.size;
            for (column, token) in tokens.chunks_exact(width).enumerate() {
                let key = &token[self.hidden + self.column..][..self.size];
                for (value, places) in key.iter().zip(panel.chunks_exact_mut(across)) {
                    places[column] = *value;
                }
            }
        }
    }

    #[inline(always)]
    fn pack_values<S: Simd>(self, tokens: &[f32], length: usize, values: &mut Aligned) {
        values.resize(self.size.next_multiple_of(S::F32_LANES) * length);
        let panel_size = PANEL * S::F32_LANES;
        let panels = values.get_mut().chunks_mut(panel_size * length).zip((0..self.size).step_by(panel_size));
        for (panel, start) in panels {
            let across = panel.len() / length;
            let size = across.min(self.size - start);
            let column = 2 * self.hidden + self.column + start;
            for (place, token) in panel.chunks_exact_mut(across).zip(tokens.chunks_exact(3 * self.hidden)) {
                place[..size].copy_from_slice(&token[column..column + size]);
                place[size..].fill(0.0);
            }
        }
    }
}

#[inline(always)]
fn write<S: Simd, const M: usize, const V: usize>(
    _simd: S,
    sums: &[[S::f32s; V]; M],
    scores: &mut [f32],
    stride: usize,
) {
    for (sums, row) in sums.iter().zip(scores.chunks_mut(stride)) {
        let (row, _) = S::as_mut_simd_f32s(&mut row[..V * S::F32_LANES]);
        row.copy_from_slice(sums);
    }
}
