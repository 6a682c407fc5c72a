//! NVRTC: from source to a cubin for one architecture. No header of the toolkit is needed.

use crate::{
    error::CudaError,
    kernels::{self, KernelShape},
};
use cudarc::nvrtc::{result, sys};
use std::ffi::{CStr, CString, c_char};

/// Machine code for one architecture, and what the assembler said of it.
#[derive(Clone, Debug)]
pub(crate) struct Compiled {
    pub(crate) cubin: Vec<u8>,
    /// Registers, spills and shared memory of each kernel, in the words of ptxas.
    pub(crate) log: String,
}

/// The compiler's version. NVRTC has been found before ([`crate::library::require_nvrtc`]).
pub(crate) fn version() -> Result<(i32, i32), CudaError> {
    let (mut major, mut minor) = (0, 0);
    // SAFETY: both pointers are to living integers, which the call fills.
    let status = unsafe { sys::nvrtcVersion(&mut major, &mut minor) };
    status.result().map_err(|error| failed("any GPU", &format!("nvrtcVersion: {error}")))?;
    Ok((major, minor))
}

/// The architecture's name of a compute capability.
pub(crate) fn architecture((major, minor): (i32, i32)) -> String {
    format!("sm_{major}{minor}")
}

/// All options; they are part of the cache's key.
pub(crate) fn options(shape: KernelShape, arch: &str) -> Vec<String> {
    let mut options =
        vec![format!("--gpu-architecture={arch}"), "--std=c++17".to_owned(), "--ptxas-options=-v".to_owned()];
    options.extend(shape.defines());
    options
}

fn failed(arch: &str, detail: &str) -> CudaError {
    CudaError::Compile { arch: arch.to_owned(), detail: detail.trim().to_owned() }
}

/// A program, freed when it goes.
struct Program(sys::nvrtcProgram);

impl Drop for Program {
    fn drop(&mut self) {
        // SAFETY: made by create_program, freed nowhere else. A failure would leave a leak, which nobody can mend.
        let _ = unsafe { result::destroy_program(self.0) };
    }
}

impl Program {
    fn log(&self) -> String {
        // SAFETY: the program lives; the call returns an own copy.
        let log = unsafe { result::get_program_log(self.0) }.unwrap_or_default();
        let bytes: Vec<u8> = log.into_iter().map(c_char::cast_unsigned).collect();
        CStr::from_bytes_until_nul(&bytes).map(|text| text.to_string_lossy().into_owned()).unwrap_or_default()
    }

    fn cubin(&self) -> Result<Vec<u8>, result::NvrtcError> {
        let mut size = 0_usize;
        // SAFETY: the program lives and has been compiled for a real architecture; `size` is filled.
        unsafe { sys::nvrtcGetCUBINSize(self.0, &mut size) }.result()?;
        let mut cubin = vec![0_u8; size];
        // SAFETY: the buffer has exactly the size that the call before asked for.
        unsafe { sys::nvrtcGetCUBIN(self.0, cubin.as_mut_ptr().cast::<c_char>()) }.result()?;
        Ok(cubin)
    }
}

/// Compiles `source` for `arch`.
pub(crate) fn compile(source: &str, shape: KernelShape, arch: &str) -> Result<Compiled, CudaError> {
    let text = CString::new(source).map_err(|_| failed(arch, "the source holds a zero byte"))?;
    let program = result::create_program(&text, Some(c"kernels.cu"))
        .map(Program)
        .map_err(|error| failed(arch, &format!("nvrtcCreateProgram: {error}")))?;
    // SAFETY: the program lives, and `text`, which it may refer to, lives longer.
    let done = unsafe { result::compile_program(program.0, &options(shape, arch)) };
    let log = program.log();
    done.map_err(|error| failed(arch, &format!("{error}\n{log}")))?;
    let cubin = program.cubin().map_err(|error| failed(arch, &format!("no cubin: {error}\n{log}")))?;
    if cubin.is_empty() {
        return Err(failed(arch, "the compiler gave an empty cubin"));
    }
    Ok(Compiled { cubin, log })
}

/// Compiles all kernels.
pub(crate) fn compile_kernels(shape: KernelShape, arch: &str) -> Result<Compiled, CudaError> {
    compile(&kernels::gpu_source(), shape, arch)
}
