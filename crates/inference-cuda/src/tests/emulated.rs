//! The kernels' own source, run on the CPU.

use super::{
    checks,
    emulator::{Emulator, Order},
    random::Random,
};
use crate::{kernels::KernelShape, precision::Precision};

/// Rows in packs of 2 and of 4, both head sizes, both formats.
const SHAPES: [KernelShape; 3] = [
    KernelShape { hidden: 64, head_dim: 32, intermediate: 136, precision: Precision::Fp16 },
    KernelShape { hidden: 128, head_dim: 64, intermediate: 256, precision: Precision::Bf16 },
    KernelShape { hidden: 384, head_dim: 32, intermediate: 1536, precision: Precision::Fp16 },
];

/// Runs a check on every shape and in several orders of threads.
fn everywhere(test: &str, check: impl Fn(&mut Emulator, &mut Random)) {
    let mut random = Random::fresh(test);
    for shape in SHAPES {
        let orders = [Order::Ascending, Order::Descending, Order::Random(random.below(1 << 20))];
        for order in orders {
            let Some(mut emulator) = Emulator::new(shape) else { return };
            emulator.order = order;
            check(&mut emulator, &mut random);
        }
    }
}

#[test]
fn embeddings_are_summed_and_normalised() {
    everywhere("embedding", |emulator, random| {
        for rows in [1, 7, 8, 33] {
            checks::embedding(emulator, random, rows);
        }
    });
}

#[test]
fn residuals_are_added_and_normalised() {
    everywhere("residual", |emulator, random| {
        for rows in [1, 9, 32] {
            checks::residual_norm(emulator, random, rows);
        }
    });
}

#[test]
fn gelu_is_the_form_with_erf() {
    everywhere("gelu", |emulator, random| {
        for rows in [1, 3, 16] {
            checks::gelu(emulator, random, rows);
        }
    });
}

#[test]
fn attention_of_many_texts_in_one_batch() {
    everywhere("attention", |emulator, random| {
        checks::attention(emulator, random, &checks::LENGTHS[..11], 1.0);
    });
}

#[test]
fn attention_of_long_texts() {
    let mut random = Random::fresh("long attention");
    for shape in &SHAPES[..2] {
        let Some(mut emulator) = Emulator::new(*shape) else { return };
        emulator.order = Order::Random(random.below(1 << 20));
        checks::attention(&mut emulator, &mut random, &[129, 511, 512], 1.0);
        // From three tiles of keys on, the two stages of shared memory are used again.
        for order in [Order::Ascending, Order::Descending] {
            emulator.order = order;
            checks::attention(&mut emulator, &mut random, &[129, 260], 1.0);
        }
    }
}

#[test]
fn attention_with_sharp_scores_does_not_overflow() {
    let mut random = Random::fresh("sharp attention");
    for shape in &SHAPES[..2] {
        let Some(mut emulator) = Emulator::new(*shape) else { return };
        // Scores of several hundred: their exponentials alone would be infinite.
        checks::attention(&mut emulator, &mut random, &[70, 3], 16.0);
    }
}

#[test]
fn texts_are_pooled_by_mean_or_first_token() {
    everywhere("pooling", |emulator, random| checks::pooling(emulator, random, &[1, 7, 8, 9, 40]));
}

#[test]
fn texts_are_classified_by_their_first_token() {
    let mut random = Random::fresh("classifier");
    for (shape, labels) in SHAPES[..2].iter().zip([1, 11]) {
        let Some(mut emulator) = Emulator::new(*shape) else { return };
        checks::classifier(&mut emulator, &mut random, &[4, 1, 9], labels);
    }
}

#[test]
fn the_emulators_own_product_is_right() {
    let mut random = Random::fresh("product");
    let Some(mut emulator) = Emulator::new(SHAPES[0]) else { return };
    checks::product(&mut emulator, &mut random, 5, 24, 16);
}
