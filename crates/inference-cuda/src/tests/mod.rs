//! What can be proven without a GPU, and what a GPU adds.
//!
//! `checks` holds each kernel against a plain fp32 reference on whatever [`Rig`] runs it: the emulator (`emulated`)
//! here, a GPU (`on_gpu`) where one is. `engine` runs the whole engine on an emulated driver.

mod checks;
mod emulated;
mod emulator;
mod engine;
mod libraries;
mod models;
mod nvrtc;
mod on_gpu;
mod random;
mod reference;
mod rig;
/// The file of `test-support` itself: the crate would bring databases and HTTP into every build of this one's tests.
#[allow(dead_code, unreachable_pub)]
#[path = "../../../test-support/src/tools.rs"]
mod tools;
