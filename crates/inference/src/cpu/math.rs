//! Functions on vectors of whatever width the processor has: exp, the erf form of GELU, layer norm, softmax.

use pulp::{Simd, WithSimd};

/// e^x with a relative error below 2e-7 for x from -87.3 to 88; beyond, the value at the border.
#[inline(always)]
pub(super) fn exp<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    let splat = |value: f32| simd.splat_f32s(value);
    // Adding 1.5 * 2^23 leaves the nearest integer in the low bits of the sum.
    let magic = splat(12_582_912.0);
    let x = simd.min_f32s(simd.max_f32s(x, splat(-87.3)), splat(88.0));
    let shifted = simd.mul_add_e_f32s(x, splat(std::f32::consts::LOG2_E), magic);
    let n = simd.sub_f32s(shifted, magic);
    // ln 2 in two parts, the first with few bits, so that n times it is exact.
    let r = simd.mul_add_e_f32s(n, splat(-0.693_359_4), x);
    let r = simd.mul_add_e_f32s(n, splat(2.121_944_4e-4), r);
    let mut p = splat(1.987_569_1e-4);
    for coefficient in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
        p = simd.mul_add_e_f32s(p, r, splat(coefficient));
    }
    let p = simd.add_f32s(simd.mul_add_e_f32s(simd.mul_f32s(r, r), p, r), splat(1.0));
    // 2^n: the low bits of `shifted` into the exponent.
    let exponent = simd.wrapping_dyn_shl_u32s(simd.transmute_u32s_f32s(shifted), simd.splat_u32s(23));
    simd.transmute_f32s_u32s(simd.add_u32s(simd.transmute_u32s_f32s(p), exponent))
}

/// erf with an absolute error below 3e-7: a quotient of two polynomials; beyond ±4 it is ±1 in fp32.
#[inline(always)]
pub(super) fn erf<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    let splat = |value: f32| simd.splat_f32s(value);
    let x = simd.min_f32s(simd.max_f32s(x, splat(-4.0)), splat(4.0));
    let square = simd.mul_f32s(x, x);
    let mut above = splat(-2.726_142e-10);
    for coefficient in
        [2.770_681_4e-8, -2.101_024e-6, -5.692_506_5e-5, -7.349_906_3e-4, -2.954_6e-3, -1.609_603_3e-2]
    {
        above = simd.mul_add_e_f32s(above, square, splat(coefficient));
    }
    let mut below = splat(-1.456_607_2e-5);
    for coefficient in [-2.133_740_6e-4, -1.682_827e-3, -7.373_329e-3, -1.426_474e-2] {
        below = simd.mul_add_e_f32s(below, square, splat(coefficient));
    }
    simd.div_f32s(simd.mul_f32s(x, above), below)
}

/// x * (1 + erf(x / sqrt 2)) / 2.
#[inline(always)]
pub(super) fn gelu<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    let half = simd.mul_f32s(x, simd.splat_f32s(0.5));
    let erf = erf(simd, simd.mul_f32s(x, simd.splat_f32s(std::f32::consts::FRAC_1_SQRT_2)));
    simd.mul_add_e_f32s(half, erf, half)
}

/// Layer norm of each row, in place.
pub(super) struct LayerNormRows<'a> {
    pub(super) rows: &'a mut [f32],
    pub(super) gamma: &'a [f32],
    pub(super) beta: &'a [f32],
    pub(super) eps: f32,
}

impl WithSimd for LayerNormRows<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        for row in self.rows.chunks_exact_mut(self.gamma.len()) {
            layer_norm(simd, row, self.gamma, self.beta, self.eps);
        }
    }
}

#[inline(always)]
pub(super) fn layer_norm<S: Simd>(simd: S, row: &mut [f32], gamma: &[f32], beta: &[f32], eps: f32) {
    let width = row.len() as f32;
    let (vectors, rest) = S::as_mut_simd_f32s(row);
    let mean = {
        let mut sums = [simd.splat_f32s(0.0); 4];
        let (fours, ones) = vectors.as_chunks::<4>();
        for four in fours {
            for (sum, vector) in sums.iter_mut().zip(four) {
                *sum = simd.add_f32s(*sum, *vector);
            }
        }
        for vector in ones {
            sums[0] = simd.add_f32s(sums[0], *vector);
        }
        (total(simd, sums) + rest.iter().sum::<f32>()) / width
    };
    // The deviations are summed on their own: the difference of two large sums would lose them.
    let centre = simd.splat_f32s(mean);
    let mut sums = [simd.splat_f32s(0.0); 4];
    let (fours, ones) = vectors.as_chunks::<4>();
    for four in fours {
        for (sum, vector) in sums.iter_mut().zip(four) {
            let off = simd.sub_f32s(*vector, centre);
            *sum = simd.mul_add_e_f32s(off, off, *sum);
        }
    }
    for vector in ones {
        let off = simd.sub_f32s(*vector, centre);
        sums[0] = simd.mul_add_e_f32s(off, off, sums[0]);
    }
    let rest_sum: f32 = rest.iter().map(|value| (value - mean) * (value - mean)).sum();
    let scale = 1.0 / ((total(simd, sums) + rest_sum) / width + eps).sqrt();
    let scales = simd.splat_f32s(scale);
    let (gammas, gamma_rest) = S::as_simd_f32s(gamma);
    let (betas, beta_rest) = S::as_simd_f32s(beta);
    for ((vector, gamma), beta) in vectors.iter_mut().zip(gammas).zip(betas) {
        let normal = simd.mul_f32s(simd.sub_f32s(*vector, centre), scales);
        *vector = simd.mul_add_e_f32s(normal, *gamma, *beta);
    }
    for ((value, gamma), beta) in rest.iter_mut().zip(gamma_rest).zip(beta_rest) {
        *value = (*value - mean) * scale * gamma + beta;
    }
}

#[inline(always)]
fn total<S: Simd>(simd: S, sums: [S::f32s; 4]) -> f32 {
    let [a, b, c, d] = sums;
    simd.reduce_sum_f32s(simd.add_f32s(simd.add_f32s(a, b), simd.add_f32s(c, d)))
}

/// Puts e^(x - highest) in place of each of the first `length` numbers and answers one over their sum. `row` is whole
/// vectors long; what lies beyond `length` is overwritten.
#[inline(always)]
pub(super) fn softmax<S: Simd>(simd: S, row: &mut [f32], length: usize) -> f32 {
    row[length..].fill(f32::MIN);
    let (vectors, _) = S::as_mut_simd_f32s(row);
    let mut highest = simd.splat_f32s(f32::MIN);
    for vector in vectors.iter() {
        highest = simd.max_f32s(highest, *vector);
    }
    let highest = simd.splat_f32s(simd.reduce_max_f32s(highest));
    let mut sum = simd.splat_f32s(0.0);
    for vector in vectors.iter_mut() {
        *vector = exp(simd, simd.sub_f32s(*vector, highest));
        sum = simd.add_f32s(sum, *vector);
    }
    1.0 / simd.reduce_sum_f32s(sum)
}
