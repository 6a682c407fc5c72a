//! English words in texts of a given number of tokens.

use crate::Failure;
use ringback_inference::{EncodeInput, Model};

/// Words that vocabularies of English models hold whole.
const WORDS: [&str; 24] = [
    "the", "city", "was", "built", "near", "a", "river", "and", "its", "people", "work", "in", "old",
    "houses", "with", "green", "doors", "while", "children", "play", "music", "every", "summer", "night",
];

/// How many different texts are made.
const TEXTS: usize = 256;

/// Texts that the model's tokenizer turns into `length` tokens each, special tokens included.
pub(crate) fn of_length(model: &Model, length: usize) -> Result<Vec<String>, Failure> {
    (0..TEXTS)
        .map(|number| {
            let mut words: Vec<&str> = Vec::new();
            let mut next = number as u32;
            // Two special tokens; words of several tokens are made up for below.
            while words.len() + 2 < length {
                next = next.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                words.push(WORDS[(next >> 16) as usize % WORDS.len()]);
            }
            loop {
                let text = words.join(" ");
                let found =
                    model.tokenizer().encode(&EncodeInput::Text(text.clone())).map_err(Failure::cannot)?;
                if found.ids.len() == length && !found.truncated {
                    return Ok(text);
                }
                if words.pop().is_none() {
                    return Err(Failure::CannotMeasure(format!("no text of {length} tokens can be made")));
                }
            }
        })
        .collect()
}
