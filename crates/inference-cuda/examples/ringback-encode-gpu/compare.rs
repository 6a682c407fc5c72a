//! sentence-transformers on the same GPU, in the same run, with the same texts.

use crate::{Arguments, Failure};
use std::{
    io::Write,
    path::Path,
    process::{Command, Stdio},
};

/// A length, its texts and our rows.
type Sample = (usize, Vec<String>, Vec<f32>);

/// Runs the Python side and prints its best figures; fails if its vectors point elsewhere.
pub(crate) fn sentence_transformers(
    python: &Path,
    arguments: &Arguments,
    samples: &[Sample],
) -> Result<(), Failure> {
    println!("\nsentence-transformers, same GPU, same texts, its best batch:");
    for (length, texts, rows) in samples {
        let input = serde_json::json!({
            "model": arguments.model, "ordinal": arguments.ordinal, "length": length, "texts": texts,
            "seconds": arguments.seconds, "precision": arguments.precision,
        });
        let mut child = Command::new(python)
            .args(["-c", include_str!("compare.py")])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(Failure::cannot)?;
        let mut stdin = child.stdin.take().ok_or_else(|| Failure::cannot("no pipe to Python"))?;
        stdin.write_all(input.to_string().as_bytes()).map_err(Failure::cannot)?;
        drop(stdin);
        let output = child.wait_with_output().map_err(Failure::cannot)?;
        if !output.status.success() {
            return Err(Failure::CannotMeasure(format!("Python ended with {}", output.status)));
        }
        let answer: serde_json::Value = serde_json::from_slice(&output.stdout).map_err(Failure::cannot)?;
        let number = |name: &str| answer[name].as_f64().unwrap_or(f64::NAN);
        println!(
            "{length:31} {:15.0} tokens/s (encode, batch {}) {:15.0} tokens/s (model alone, batch {})",
            number("encode_tokens_s"),
            number("encode_batch"),
            number("forward_tokens_s"),
            number("forward_batch")
        );
        let theirs: Vec<f32> = answer["rows"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(|x| x.as_f64())
            .map(|x| x as f32)
            .collect();
        same_direction(*length, rows, &theirs, texts.len())?;
    }
    Ok(())
}

fn same_direction(length: usize, ours: &[f32], theirs: &[f32], texts: usize) -> Result<(), Failure> {
    if ours.len() != theirs.len() {
        return Err(Failure::Wrong(format!(
            "{} numbers, sentence-transformers has {}",
            ours.len(),
            theirs.len()
        )));
    }
    let width = ours.len() / texts;
    let least = ours
        .chunks_exact(width)
        .zip(theirs.chunks_exact(width))
        .map(|(ours, theirs)| {
            let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>();
            dot(ours, theirs) / (dot(ours, ours) * dot(theirs, theirs)).sqrt()
        })
        .fold(f32::INFINITY, f32::min);
    println!("{:31} least cosine to ours: {least:.5}", "");
    if least < 0.998 {
        return Err(Failure::Wrong(format!("cosine {least} to sentence-transformers at {length} tokens")));
    }
    Ok(())
}
