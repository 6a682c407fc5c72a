//! What the kernels should compute, in plain fp32 (sums in fp64), written from the formulas.

/// Layer norm of one row.
pub(super) fn layer_norm(row: &[f32], gamma: &[f32], beta: &[f32], eps: f32) -> Vec<f32> {
    let count = row.len() as f64;
    let mean = row.iter().map(|x| f64::from(*x)).sum::<f64>() / count;
    let variance = row.iter().map(|x| (f64::from(*x) - mean).powi(2)).sum::<f64>() / count;
    let inverse = 1.0 / (variance + f64::from(eps)).sqrt();
    row.iter()
        .zip(gamma.iter().zip(beta))
        .map(|(x, (gamma, beta))| ((f64::from(*x) - mean) * inverse) as f32 * gamma + beta)
        .collect()
}

/// GELU in its erf form, the integral by its series (enough terms for |x| < 6).
pub(super) fn gelu(x: f32) -> f32 {
    let z = f64::from(x) / std::f64::consts::SQRT_2;
    let erf = if z.abs() > 5.0 {
        z.signum()
    } else {
        let (mut term, mut sum) = (z, z);
        for n in 1..200 {
            let n = f64::from(n);
            term *= -z * z / n;
            sum += term / (2.0 * n + 1.0);
        }
        2.0 / std::f64::consts::PI.sqrt() * sum
    };
    (0.5 * f64::from(x) * (1.0 + erf)) as f32
}

/// Attention of one text and head: rows of `width` numbers, whose `head_dim` from `offset` on belong to this head.
pub(super) fn attention(qkv: &[f32], hidden: usize, head: usize, head_dim: usize) -> Vec<Vec<f32>> {
    let rows: Vec<&[f32]> = qkv.chunks_exact(3 * hidden).collect();
    let part = |row: &'_ [f32], which: usize| {
        let from = which * hidden + head * head_dim;
        row[from..from + head_dim].to_vec()
    };
    let keys: Vec<Vec<f32>> = rows.iter().map(|row| part(row, 1)).collect();
    let values: Vec<Vec<f32>> = rows.iter().map(|row| part(row, 2)).collect();
    rows.iter()
        .map(|row| {
            let query = part(row, 0);
            let scores: Vec<f64> = keys
                .iter()
                .map(|key| {
                    let dot: f64 = query.iter().zip(key).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
                    dot / (head_dim as f64).sqrt()
                })
                .collect();
            let top = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let shares: Vec<f64> = scores.iter().map(|score| (score - top).exp()).collect();
            let all: f64 = shares.iter().sum();
            (0..head_dim)
                .map(|d| {
                    let sum: f64 =
                        shares.iter().zip(&values).map(|(share, row)| share * f64::from(row[d])).sum();
                    (sum / all) as f32
                })
                .collect()
        })
        .collect()
}

/// `weight · x + bias`.
pub(super) fn linear(weight: &[f32], bias: &[f32], x: &[f32]) -> Vec<f32> {
    weight
        .chunks_exact(x.len())
        .zip(bias)
        .map(|(row, bias)| {
            let dot: f64 = row.iter().zip(x).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
            dot as f32 + bias
        })
        .collect()
}

/// Divided by its length.
pub(super) fn normalised(row: &[f32]) -> Vec<f32> {
    let length = row.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt() as f32;
    row.iter().map(|x| x / length).collect()
}

/// Cosine of the angle between two vectors.
pub(super) fn cosine(a: &[f32], b: &[f32]) -> f64 {
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
}
