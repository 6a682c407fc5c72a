//! The loops behind the figures.

use crate::Failure;
use ringback_inference::{Batch, EncodeInput, Encoder, EncoderHandle, Engine, EngineError, Outputs};
use std::time::{Duration, Instant};

/// Multiplications and additions of the model per token, at this length: the linear layers and the attention.
pub(crate) fn flop_per_token(encoder: &Encoder, length: usize) -> f64 {
    let (hidden, inner) = (encoder.config.hidden_size as f64, encoder.config.intermediate_size as f64);
    let linear = 2.0 * (4.0 * hidden * hidden + 2.0 * hidden * inner);
    let attention = 4.0 * hidden * length as f64;
    encoder.config.num_hidden_layers as f64 * (linear + attention)
}

/// Texts of one length with token ids that differ from text to text.
fn batch(encoder: &Encoder, length: usize, texts: usize) -> Batch {
    let mut batch = Batch::new();
    let mut next = 1_u32;
    for _ in 0..texts {
        let ids: Vec<u32> = (0..length)
            .map(|_| {
                next = next.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (next >> 8) % encoder.config.vocab_size as u32
            })
            .collect();
        batch.push(&ids, &vec![0; length], encoder.config.position_offset);
    }
    batch
}

/// Median and 99th percentile in microseconds of one text of 16 tokens, one after the other.
pub(crate) fn latency(
    engine: &mut dyn Engine,
    encoder: &Encoder,
    time: Duration,
) -> Result<(f64, f64), EngineError> {
    let batch = batch(encoder, 16, 1);
    let mut outputs = Outputs::default();
    let mut taken = Vec::new();
    for _ in 0..20 {
        engine.submit(&batch)?;
        engine.collect(&mut outputs)?;
    }
    let begun = Instant::now();
    while taken.is_empty() || begun.elapsed() < time {
        let one = Instant::now();
        engine.submit(&batch)?;
        engine.collect(&mut outputs)?;
        taken.push(one.elapsed().as_secs_f64() * 1e6);
    }
    taken.sort_by(f64::total_cmp);
    Ok((taken[taken.len() / 2], taken[taken.len() * 99 / 100]))
}

/// Tokens per second with as many batches under way as the engine takes.
pub(crate) fn throughput(
    engine: &mut dyn Engine,
    encoder: &Encoder,
    length: usize,
    texts: usize,
    time: Duration,
) -> Result<f64, EngineError> {
    let batch = batch(encoder, length, texts);
    let mut outputs = Outputs::default();
    let depth = engine.pipeline_depth();
    // Algorithms, graphs and clocks settle before the measured part.
    let mut begun = Instant::now();
    let (mut submitted, mut collected, mut counted_from) = (0_usize, 0_usize, None);
    loop {
        let warm = counted_from.is_none() && collected >= 8 && begun.elapsed() > time / 4;
        if warm {
            begun = Instant::now();
            counted_from = Some(collected);
        }
        let over = counted_from.is_some() && begun.elapsed() >= time;
        if !over && submitted - collected < depth {
            engine.submit(&batch)?;
            submitted += 1;
            continue;
        }
        if submitted == collected {
            break;
        }
        engine.collect(&mut outputs)?;
        collected += 1;
    }
    let batches = collected - counted_from.unwrap_or(0);
    Ok((batches * batch.tokens()) as f64 / begun.elapsed().as_secs_f64())
}

/// Requests under way at once, and texts of each.
const REQUESTS: usize = 64;
const TEXTS_PER_REQUEST: usize = 128;

/// Tokens per second through tokenizer threads, batcher and engine; and the rows of `texts`, to be compared.
pub(crate) fn end_to_end(
    handle: &EncoderHandle,
    texts: &[String],
    length: usize,
    time: Duration,
) -> Result<(f64, Vec<f32>), Failure> {
    let request = |from: usize| -> Vec<EncodeInput> {
        let all = texts.iter().cycle().skip(from % texts.len());
        all.take(TEXTS_PER_REQUEST).cloned().map(EncodeInput::Text).collect()
    };
    let first = futures::executor::block_on(
        handle.encode(texts.iter().cloned().map(EncodeInput::Text).collect(), None),
    )
    .map_err(Failure::cannot)?;
    if let Some(found) = first.tokens.iter().find(|tokens| **tokens as usize != length) {
        return Err(Failure::Wrong(format!("a text of {length} tokens was taken for one of {found}")));
    }
    let begun = Instant::now();
    let mut waiting = std::collections::VecDeque::new();
    let (mut sent, mut rows) = (0, 0);
    loop {
        let over = begun.elapsed() >= time;
        if !over && waiting.len() < REQUESTS {
            waiting.push_back(handle.encode(request(sent), None));
            sent += TEXTS_PER_REQUEST;
            continue;
        }
        let Some(next) = waiting.pop_front() else { break };
        rows += futures::executor::block_on(next).map_err(Failure::cannot)?.tokens.len();
    }
    Ok(((rows * length) as f64 / begun.elapsed().as_secs_f64(), first.values))
}
