//! The encoder engine on NVIDIA GPUs.
//!
//! Built without a toolkit and started without a driver: [`is_available`] looks first and says in words what is
//! missing. At run time it needs the driver, NVRTC (compiles `kernels/` once per model shape and GPU, kept in a cache)
//! and cublasLt. [`CudaEngine`] is a [`ringback_inference::Engine`]: varlen batches, fp16 or bf16 with fp32 sums, two
//! batches under way, CUDA graphs for small ones.
//!
//! Where to look: `kernels/` the CUDA source; [`forward`] the order of kernels and products, shared by the GPU and by
//! the emulator of the tests; [`engine`] streams and events; [`memory`] what is asked of the GPU before anything is
//! taken; [`library`] why nothing panics where something is missing.
//!
//! The only crate with `unsafe`: each block says why it is sound.

mod cache;
mod compiler;
mod device;
mod engine;
mod error;
mod forward;
mod gemm;
mod gpu;
mod graphs;
mod input;
mod kernels;
mod library;
mod memory;
mod options;
mod precision;
mod slot;
mod weights;

#[cfg(test)]
mod tests;

pub use device::{Availability, DeviceInfo, devices, is_available};
pub use engine::CudaEngine;
pub use error::CudaError;
pub use kernels::KernelShape;
pub use memory::required_bytes;
pub use options::CudaOptions;
pub use precision::Precision;
