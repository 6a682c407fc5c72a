//! Something that runs kernels.

use crate::{
    forward::{Arg, Gemm},
    kernels::{Kernel, KernelShape},
};

/// Memory and kernels of a device. Failures panic: this is a test.
pub(super) trait Rig {
    /// What the kernels are specialised for.
    fn shape(&self) -> KernelShape;

    /// Copies bytes into fresh memory of the device, with guards around it where the rig can.
    fn put(&mut self, bytes: &[u8]) -> u64;

    /// The bytes at an address that [`Rig::put`] gave.
    fn get(&mut self, at: u64, bytes: usize) -> Vec<u8>;

    /// Runs a kernel to its end.
    fn launch(&mut self, kernel: Kernel, grid: [u32; 2], args: &[Arg]);

    /// Runs a product to its end.
    fn gemm(&mut self, gemm: Gemm);
}

/// Bytes of numbers.
pub(super) fn bytes_of<T: Copy, const N: usize>(values: &[T], encode: impl Fn(T) -> [u8; N]) -> Vec<u8> {
    values.iter().flat_map(|value| encode(*value)).collect()
}

/// Typed ways into a rig's memory.
pub(super) trait RigExt: Rig {
    fn put_u32(&mut self, values: &[u32]) -> u64 {
        self.put(&bytes_of(values, u32::to_ne_bytes))
    }

    fn put_f32(&mut self, values: &[f32]) -> u64 {
        self.put(&bytes_of(values, f32::to_ne_bytes))
    }

    /// Half precision; `values` become what the device will really see.
    fn put_half(&mut self, values: &mut [f32]) -> u64 {
        let precision = self.shape().precision;
        let bits: Vec<u16> = values
            .iter()
            .map(|value| precision.encode("test", *value).expect("a number that fits"))
            .collect();
        for (value, bits) in values.iter_mut().zip(&bits) {
            *value = precision.decode(*bits);
        }
        self.put(&bytes_of(&bits, u16::to_ne_bytes))
    }

    /// Room for `count` numbers in half precision, filled with NaN.
    fn room_half(&mut self, count: usize) -> u64 {
        self.put(&vec![0xff; 2 * count])
    }

    /// Room for `count` fp32 numbers, filled with NaN.
    fn room_f32(&mut self, count: usize) -> u64 {
        self.put(&vec![0xff; 4 * count])
    }

    fn get_half(&mut self, at: u64, count: usize) -> Vec<f32> {
        let precision = self.shape().precision;
        let bytes = self.get(at, 2 * count);
        bytes.chunks_exact(2).map(|pair| precision.decode(u16::from_ne_bytes([pair[0], pair[1]]))).collect()
    }

    fn get_f32(&mut self, at: u64, count: usize) -> Vec<f32> {
        let bytes = self.get(at, 4 * count);
        bytes.chunks_exact(4).map(|four| f32::from_ne_bytes([four[0], four[1], four[2], four[3]])).collect()
    }
}

impl<R: Rig + ?Sized> RigExt for R {}
