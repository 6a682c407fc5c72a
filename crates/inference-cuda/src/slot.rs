//! One of the batches under way: its buffers on both sides and the event that tells of its end.

use crate::{error::CudaError, input::Shape, memory::Plan};
use cudarc::driver::{
    CudaContext, CudaEvent, CudaSlice, CudaStream, DevicePtr, PinnedHostSlice, ValidAsZeroBits, result,
    sys::CUevent_flags,
};
use std::sync::Arc;

/// Buffers of a batch. While the batch is under way, the GPU reads and writes them and the host does not.
pub(crate) struct Slot {
    input_host: Pinned<u32>,
    output_host: Pinned<f32>,
    input_device: CudaSlice<u32>,
    output_device: CudaSlice<f32>,
    /// The input has arrived on the GPU.
    pub(crate) uploaded: CudaEvent,
    /// The output lies on the GPU.
    pub(crate) computed: CudaEvent,
    /// The output lies on the host. Waiting for it lets the thread sleep.
    pub(crate) finished: CudaEvent,
}

impl Slot {
    pub(crate) fn new(
        context: &Arc<CudaContext>,
        stream: &Arc<CudaStream>,
        plan: &Plan,
    ) -> Result<Self, CudaError> {
        let driver = |call: &'static str| move |error| CudaError::driver(call, error);
        // SAFETY: page-locked memory comes without content, and any bits are a u32 or an f32. What the host reads of
        // it has been written by the host or by a finished copy. No flags: write-combined memory is slow to read.
        let (input, output) = unsafe {
            (
                context
                    .alloc_pinned_with_flags::<u32>(plan.input_words, 0)
                    .map_err(driver("page-locked memory"))?,
                context
                    .alloc_pinned_with_flags::<f32>(plan.output_floats, 0)
                    .map_err(driver("page-locked memory"))?,
            )
        };
        let event = |flags| context.new_event(Some(flags)).map_err(driver("an event"));
        Ok(Self {
            input_host: Pinned::new(input)?,
            output_host: Pinned::new(output)?,
            input_device: stream.alloc_zeros(plan.input_words).map_err(driver("memory for the input"))?,
            output_device: stream.alloc_zeros(plan.output_floats).map_err(driver("memory for the output"))?,
            uploaded: event(CUevent_flags::CU_EVENT_DISABLE_TIMING)?,
            computed: event(CUevent_flags::CU_EVENT_DISABLE_TIMING)?,
            finished: context.new_event(Some(BLOCKING)).map_err(driver("an event"))?,
        })
    }

    /// Where the host writes the input. Only for a slot whose batch has been collected.
    pub(crate) fn input(&mut self) -> &mut [u32] {
        self.input_host.as_mut_slice()
    }

    /// Where the host reads the output. Only for a slot whose [`Slot::finished`] has passed.
    pub(crate) fn output(&self) -> &[f32] {
        self.output_host.as_slice()
    }

    /// Addresses of the input and the output on the GPU.
    pub(crate) fn addresses(&self, stream: &CudaStream) -> (u64, u64) {
        // With event tracking off the guards do nothing: the order of streams is the engine's.
        (self.input_device.device_ptr(stream).0, self.output_device.device_ptr(stream).0)
    }

    /// Starts the copy of the input to the GPU.
    pub(crate) fn upload(&mut self, shape: Shape, stream: &CudaStream) -> Result<(), CudaError> {
        let to = self.input_device.device_ptr(stream).0;
        let words = &self.input_host.as_slice()[..shape.words()];
        // SAFETY: source and target are as long as the plan says, which holds every shape; both live in the slot, which
        // the engine keeps until its streams are done, and the host leaves the source alone until the batch is
        // collected.
        unsafe { result::memcpy_htod_async(to, words, stream.cu_stream()) }
            .map_err(|error| CudaError::driver("copying the input", error))
    }

    /// Starts the copy of `floats` numbers of output to the host.
    pub(crate) fn download(&mut self, floats: usize, stream: &CudaStream) -> Result<(), CudaError> {
        let from = self.output_device.device_ptr(stream).0;
        let target = &mut self.output_host.as_mut_slice()[..floats];
        // SAFETY: as in `upload`; the host does not look at the target before `finished` has passed.
        unsafe { result::memcpy_dtoh_async(target, from, stream.cu_stream()) }
            .map_err(|error| CudaError::driver("copying the output", error))
    }
}

/// The waiting thread sleeps instead of spinning.
const BLOCKING: CUevent_flags = CUevent_flags::CU_EVENT_BLOCKING_SYNC;

/// Page-locked memory whose owner knows when copies are under way. cudarc's own way to its content waits for an event,
/// which must not happen while a graph is recorded.
struct Pinned<T> {
    memory: PinnedHostSlice<T>,
    content: *mut T,
}

// SAFETY: the memory is tied to no thread, and the pointer is one into it.
unsafe impl<T: Send> Send for Pinned<T> {}

impl<T: ValidAsZeroBits> Pinned<T> {
    fn new(mut memory: PinnedHostSlice<T>) -> Result<Self, CudaError> {
        let content = memory.as_mut_ptr().map_err(|error| CudaError::driver("page-locked memory", error))?;
        Ok(Self { memory, content })
    }

    fn as_slice(&self) -> &[T] {
        // SAFETY: the memory has this length and lives as long as `self`, and any bits are a value. No copy into it is
        // under way: the engine reads a slot only after its `finished`.
        unsafe { std::slice::from_raw_parts(self.content, self.memory.len()) }
    }

    fn as_mut_slice(&mut self) -> &mut [T] {
        // SAFETY: as above; `&mut self` makes it the only reference, and no copy from it is under way: the engine
        // writes a slot only after its batch was collected.
        unsafe { std::slice::from_raw_parts_mut(self.content, self.memory.len()) }
    }
}
