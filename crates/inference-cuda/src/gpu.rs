//! [`Ops`] on a real GPU: kernels of a loaded module and products of cublasLt, on one stream.

use crate::{
    cache, compiler,
    error::CudaError,
    forward::{Arg, Gemm, Ops},
    gemm::Gemms,
    kernels::{self, Kernel, KernelShape},
};
use cudarc::{
    driver::{CudaContext, CudaFunction, CudaStream, result},
    nvrtc::Ptx,
};
use std::{ffi::c_void, path::Path, sync::Arc};

/// The kernels of one model, loaded into a context.
pub(crate) struct Kernels {
    functions: Vec<CudaFunction>,
}

impl Kernels {
    /// Takes the kernels from the cache or compiles them, and loads them.
    pub(crate) fn load(
        context: &Arc<CudaContext>,
        capability: (i32, i32),
        shape: KernelShape,
        folder: Option<&Path>,
    ) -> Result<Self, CudaError> {
        let arch = compiler::architecture(capability);
        let key = cache::key(&kernels::gpu_source(), &compiler::options(shape, &arch), compiler::version()?);
        let make = || {
            tracing::info!(%arch, "compiling GPU kernels");
            compiler::compile_kernels(shape, &arch).map(|compiled| {
                tracing::debug!(log = compiled.log, "compiled");
                compiled.cubin
            })
        };
        let cubin = cache::get_or_make(folder, &key, make)?;
        let module = context
            .load_module(Ptx::from_binary(cubin))
            .map_err(|error| CudaError::driver("loading the kernels", error))?;
        let functions = Kernel::ALL
            .into_iter()
            .map(|kernel| {
                module
                    .load_function(kernel.name())
                    .map_err(|error| CudaError::driver("finding a kernel", error))
            })
            .collect::<Result<_, _>>()?;
        Ok(Self { functions })
    }
}

/// Runs one batch's work on a stream.
pub(crate) struct GpuOps<'a> {
    kernels: &'a Kernels,
    gemms: &'a mut Gemms,
    stream: &'a CudaStream,
}

impl<'a> GpuOps<'a> {
    /// # Safety
    /// Until the stream has passed all that is started here: every address given in arguments and products belongs to
    /// device memory that is alive, large enough, and used by no other stream; kernels, products' workspace and
    /// streams belong to one context, which is current on this thread.
    pub(crate) unsafe fn new(kernels: &'a Kernels, gemms: &'a mut Gemms, stream: &'a CudaStream) -> Self {
        Self { kernels, gemms, stream }
    }
}

impl Ops for GpuOps<'_> {
    type Error = CudaError;

    fn launch(&mut self, kernel: Kernel, grid: [u32; 2], args: &[Arg]) -> Result<(), CudaError> {
        if grid.contains(&0) {
            return Ok(());
        }
        let mut values: Vec<*mut c_void> = args
            .iter()
            .map(|arg| match arg {
                Arg::Pointer(value) => std::ptr::from_ref(value).cast_mut().cast(),
                Arg::U32(value) => std::ptr::from_ref(value).cast_mut().cast(),
                Arg::F32(value) => std::ptr::from_ref(value).cast_mut().cast(),
            })
            .collect();
        let function = self.kernels.functions[kernel as usize].cu_function();
        // SAFETY: the driver copies the arguments before it returns; their number and types are those of the kernel,
        // which the emulated forward pass checks in the tests for this very list. The memory behind the addresses is
        // the promise made to `new`.
        unsafe {
            result::launch_kernel(
                function,
                (grid[0], grid[1], 1),
                (kernel.threads(), 1, 1),
                0,
                self.stream.cu_stream(),
                &mut values,
            )
        }
        .map_err(|error| CudaError::driver("a kernel", error))
    }

    fn gemm(&mut self, gemm: Gemm) -> Result<(), CudaError> {
        // SAFETY: the promise made to `new`.
        unsafe { self.gemms.start(gemm, self.stream.cu_stream()) }
    }
}
