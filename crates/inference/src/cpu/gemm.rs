//! `C = A · Wᵀ` with weights that were packed once.
//!
//! A tile of C, a few rows by three vectors, stays in registers over the whole inner dimension. Weights lie in panels
//! of three vectors' width, so the inner loop reads them in order; rows of A are read in place, one number of each row
//! broadcast per step. What follows the product (bias, GELU, the residual) happens on the registers of the tile.

use super::{aligned::Aligned, math};
use pulp::{Arch, Simd, WithSimd};

/// Vectors per panel.
const PANEL: usize = 3;

/// Numbers per vector of this processor.
pub(super) fn lanes(arch: Arch) -> usize {
    struct Lanes;
    impl WithSimd for Lanes {
        type Output = usize;
        #[inline(always)]
        fn with_simd<S: Simd>(self, _: S) -> usize {
            S::F32_LANES
        }
    }
    arch.dispatch(Lanes)
}

/// Weights `[n][k]` in panels: panel after panel, in each for every k the panel's columns side by side.
#[derive(Debug)]
pub(super) struct Packed {
    pub(super) n: usize,
    pub(super) k: usize,
    lanes: usize,
    data: Aligned,
    bias: Aligned,
}

impl Packed {
    /// Packs `weight`, row-major `[n][k]`, for vectors of `lanes` numbers.
    pub(super) fn new(weight: &[f32], bias: &[f32], k: usize, lanes: usize) -> Self {
        let n = bias.len();
        let padded = n.next_multiple_of(lanes);
        let mut data = Aligned::zeroed(padded * k);
        for (panel, columns) in
            data.get_mut().chunks_mut(PANEL * lanes * k).zip((0..n).step_by(PANEL * lanes))
        {
            let width = panel.len() / k;
            for (column, row) in weight[columns * k..].chunks_exact(k).take(width).enumerate() {
                for (value, place) in row.iter().zip(panel[column..].iter_mut().step_by(width)) {
                    *place = *value;
                }
            }
        }
        let mut padded_bias = Aligned::zeroed(padded);
        padded_bias.get_mut()[..n].copy_from_slice(bias);
        Self { n, k, lanes, data, bias: padded_bias }
    }
}

/// What happens to a tile before it is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Finish {
    /// `C = tile + bias`.
    Store,
    /// `C = gelu(tile + bias)`.
    Gelu,
    /// `C = C + tile + bias`.
    Add,
}

/// One product: all rows of `a` (each `k` long, `a_stride` apart) into rows of `c` (`n` long, end to end).
pub(super) struct Product<'a> {
    pub(super) a: &'a [f32],
    pub(super) weights: &'a Packed,
    pub(super) c: &'a mut [f32],
    pub(super) finish: Finish,
}

impl WithSimd for Product<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        assert_eq!(self.weights.lanes, S::F32_LANES, "weights are packed for this processor");
        let Packed { n, k, .. } = *self.weights;
        let columns = PANEL * S::F32_LANES;
        let panels = self.weights.data.get().chunks(columns * k);
        let biases = self.weights.bias.get().chunks(columns);
        for ((panel, bias), start) in panels.zip(biases).zip((0..n).step_by(columns)) {
            let place = Place { start, width: columns.min(n - start), n, finish: self.finish };
            let (panel, _) = S::as_simd_f32s(panel);
            let (bias, _) = S::as_simd_f32s(bias);
            match bias.len() {
                1 => column::<S, 1>(simd, self.a, k, panel, bias, self.c, place),
                2 => column::<S, 2>(simd, self.a, k, panel, bias, self.c, place),
                _ => column::<S, PANEL>(simd, self.a, k, panel, bias, self.c, place),
            }
        }
    }
}

/// Where a panel's columns lie in C.
#[derive(Clone, Copy)]
struct Place {
    start: usize,
    width: usize,
    n: usize,
    finish: Finish,
}

/// All rows of one panel.
#[inline(always)]
fn column<S: Simd, const V: usize>(
    simd: S,
    a: &[f32],
    k: usize,
    panel: &[S::f32s],
    bias: &[S::f32s],
    c: &mut [f32],
    place: Place,
) {
    let (panel, _) = panel.as_chunks::<V>();
    let mut a = a;
    let mut c = c;
    // 16 registers hold 4 rows of 3 vectors, 32 hold 8.
    if S::REGISTER_COUNT >= 32 {
        (a, c) = blocks::<S, 8, V>(simd, a, k, panel, bias, c, place);
    }
    (a, c) = blocks::<S, 4, V>(simd, a, k, panel, bias, c, place);
    blocks::<S, 1, V>(simd, a, k, panel, bias, c, place);
}

/// As many blocks of `M` rows as there are; answers the rows left.
#[inline(always)]
fn blocks<'a, 'c, S: Simd, const M: usize, const V: usize>(
    simd: S,
    a: &'a [f32],
    k: usize,
    panel: &[[S::f32s; V]],
    bias: &[S::f32s],
    c: &'c mut [f32],
    place: Place,
) -> (&'a [f32], &'c mut [f32]) {
    let whole = a.len() / (M * k);
    let (a, a_rest) = a.split_at(whole * M * k);
    let (c, c_rest) = c.split_at_mut(whole * M * place.n);
    for (a, c) in a.chunks_exact(M * k).zip(c.chunks_exact_mut(M * place.n)) {
        let rows: [&[f32]; M] = std::array::from_fn(|row| &a[row * k..(row + 1) * k]);
        let sums = tile(simd, rows, panel);
        for (sums, row) in sums.iter().zip(c.chunks_exact_mut(place.n)) {
            let row = &mut row[place.start..place.start + place.width];
            for ((sum, bias), part) in sums.iter().zip(bias).zip(row.chunks_mut(S::F32_LANES)) {
                let value = simd.add_f32s(*sum, *bias);
                store(simd, value, part, place.finish);
            }
        }
    }
    (a_rest, c_rest)
}

#[inline(always)]
fn store<S: Simd>(simd: S, value: S::f32s, part: &mut [f32], finish: Finish) {
    if let [whole] = S::as_mut_simd_f32s(part).0 {
        *whole = match finish {
            Finish::Store => value,
            Finish::Gelu => math::gelu(simd, value),
            Finish::Add => simd.add_f32s(*whole, value),
        };
    } else {
        let value = match finish {
            Finish::Store => value,
            Finish::Gelu => math::gelu(simd, value),
            Finish::Add => simd.add_f32s(simd.partial_load_f32s(part), value),
        };
        simd.partial_store_f32s(part, value);
    }
}

/// `M` rows by `V` vectors: the inner product over all of `panel`.
#[inline(always)]
pub(super) fn tile<S: Simd, const M: usize, const V: usize>(
    simd: S,
    rows: [&[f32]; M],
    panel: &[[S::f32s; V]],
) -> [[S::f32s; V]; M] {
    let mut sums = [[simd.splat_f32s(0.0); V]; M];
    let rows = rows.map(|row| &row[..panel.len()]);
    for (step, vectors) in panel.iter().enumerate() {
        for (sums, row) in sums.iter_mut().zip(&rows) {
            let value = simd.splat_f32s(row[step]);
            for (sum, vector) in sums.iter_mut().zip(vectors) {
                *sum = simd.mul_add_e_f32s(value, *vector, *sum);
            }
        }
    }
    sums
}
