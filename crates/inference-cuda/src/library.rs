//! Finding NVIDIA's libraries without linking to them, and saying in words what is missing.
//!
//! cudarc opens each library by its name at the first call and panics if it is not there, or lacks a function. So
//! nothing of cudarc is called before [`require_driver`], [`require_nvrtc`] or [`require_cublaslt`] has looked.

use std::path::{Path, PathBuf};

/// Every function of the driver that is called through cudarc. All exist since CUDA 11.4 (driver 470); cudarc's
/// newer bindings would use others for timing between events and context creation, which is why neither is used.
const DRIVER: [&str; 40] = [
    "cuInit",
    "cuDriverGetVersion",
    "cuDeviceGet",
    "cuDeviceGetCount",
    "cuDeviceGetName",
    "cuDeviceGetAttribute",
    "cuDeviceTotalMem_v2",
    "cuDevicePrimaryCtxRetain",
    "cuDevicePrimaryCtxRelease_v2",
    "cuCtxGetCurrent",
    "cuCtxSetCurrent",
    "cuCtxSynchronize",
    "cuMemGetInfo_v2",
    "cuMemAllocAsync",
    "cuMemAlloc_v2",
    "cuMemFreeAsync",
    "cuMemFree_v2",
    "cuMemHostAlloc",
    "cuMemFreeHost",
    "cuMemcpyHtoDAsync_v2",
    "cuMemcpyDtoHAsync_v2",
    "cuMemsetD8Async",
    "cuStreamCreate",
    "cuStreamDestroy_v2",
    "cuStreamSynchronize",
    "cuStreamWaitEvent",
    "cuStreamBeginCapture_v2",
    "cuStreamEndCapture",
    "cuEventCreate",
    "cuEventDestroy_v2",
    "cuEventRecord",
    "cuEventSynchronize",
    "cuModuleLoadData",
    "cuModuleUnload",
    "cuModuleGetFunction",
    "cuLaunchKernel",
    "cuGraphInstantiateWithFlags",
    "cuGraphLaunch",
    "cuGraphExecDestroy",
    "cuGraphDestroy",
];

const NVRTC: [&str; 8] = [
    "nvrtcVersion",
    "nvrtcCreateProgram",
    "nvrtcCompileProgram",
    "nvrtcDestroyProgram",
    "nvrtcGetProgramLogSize",
    "nvrtcGetProgramLog",
    "nvrtcGetCUBINSize",
    "nvrtcGetCUBIN",
];

const CUBLASLT: [&str; 13] = [
    "cublasLtCreate",
    "cublasLtDestroy",
    "cublasLtMatmul",
    "cublasLtMatmulAlgoGetHeuristic",
    "cublasLtMatmulDescCreate",
    "cublasLtMatmulDescDestroy",
    "cublasLtMatmulDescSetAttribute",
    "cublasLtMatrixLayoutCreate",
    "cublasLtMatrixLayoutDestroy",
    "cublasLtMatmulPreferenceCreate",
    "cublasLtMatmulPreferenceDestroy",
    "cublasLtMatmulPreferenceSetAttribute",
    "cublasLtGetVersion",
];

/// Opens `file` of the first folder that has it and keeps it open for the life of the process. The loader then finds
/// it by its SONAME for whoever asks next, which is how a library outside of the loader's path reaches cudarc.
fn keep_open(folders: &[PathBuf], files: &[&str]) {
    for path in folders.iter().flat_map(|folder| files.iter().map(move |file| folder.join(file))) {
        if path.is_file() && open(&path) {
            return;
        }
    }
}

fn open(path: &Path) -> bool {
    // SAFETY: loading runs the initialisers of a library that the operator named by its folder and NVIDIA by its file
    // name; they need nothing from us. The handle is never closed, so no function pointer taken from it can dangle.
    match unsafe { libloading::Library::new(path) } {
        Ok(library) => {
            std::mem::forget(library);
            true
        }
        Err(error) => {
            tracing::warn!(path = %path.display(), %error, "a CUDA library does not load");
            false
        }
    }
}

fn lacking(library: &libloading::Library, functions: &[&str]) -> Vec<String> {
    functions
        .iter()
        // SAFETY: the symbol is only looked up, as an address that is neither called nor read.
        .filter(|name| unsafe { library.get::<*mut std::ffi::c_void>(name.as_bytes()) }.is_err())
        .map(|name| (*name).to_owned())
        .collect()
}

fn complete(library: &libloading::Library, functions: &[&str], older: &str) -> Result<(), String> {
    match lacking(library, functions) {
        missing if missing.is_empty() => Ok(()),
        missing => Err(format!("{older} (it lacks {})", missing.join(", "))),
    }
}

/// Whether the driver can be called.
///
/// # Errors
/// In words, what is missing and what to do.
pub(crate) fn require_driver() -> Result<(), String> {
    // SAFETY: loads and closes the driver's library; its initialisers need nothing from us.
    if !unsafe { cudarc::driver::sys::is_culib_present() } {
        return Err("the CUDA driver library (libcuda.so.1) is not installed".to_owned());
    }
    // SAFETY: the library is there, so this opens it and does not panic.
    let library = unsafe { cudarc::driver::sys::culib() };
    complete(library, &DRIVER, "the CUDA driver is too old: install 525 or newer")
}

/// Whether the compiler can be called; `folders` are looked into before the loader's path.
///
/// # Errors
/// In words, what is missing and what to do.
pub(crate) fn require_nvrtc(folders: &[PathBuf]) -> Result<(), String> {
    keep_open(folders, &["libnvrtc.so.13", "libnvrtc.so.12"]);
    // SAFETY: loads and closes the library; its initialisers need nothing from us.
    if !unsafe { cudarc::nvrtc::sys::is_culib_present() } {
        return Err(format!(
            "NVRTC (libnvrtc.so.13 or .12), which compiles the kernels, is not found: install the Python package \
             nvidia-cuda-nvrtc or the CUDA toolkit's cuda-nvrtc, and name its folder in LD_LIBRARY_PATH or \
             library_dirs{}",
            searched(folders)
        ));
    }
    // SAFETY: the library is there, so this opens it and does not panic.
    let library = unsafe { cudarc::nvrtc::sys::culib() };
    complete(library, &NVRTC, "NVRTC is too old: install 12 or 13")
}

/// Whether matrices can be multiplied; `folders` are looked into before the loader's path.
///
/// # Errors
/// In words, what is missing and what to do.
pub(crate) fn require_cublaslt(folders: &[PathBuf]) -> Result<(), String> {
    keep_open(folders, &["libcublasLt.so.13", "libcublasLt.so.12"]);
    // SAFETY: loads and closes the library; its initialisers need nothing from us.
    if !unsafe { cudarc::cublaslt::sys::is_culib_present() } {
        return Err(format!(
            "cublasLt (libcublasLt.so.13 or .12), which multiplies matrices, is not found: install the Python package \
             nvidia-cublas or the CUDA toolkit's libcublas, and name its folder in LD_LIBRARY_PATH or library_dirs{}",
            searched(folders)
        ));
    }
    // SAFETY: the library is there, so this opens it and does not panic.
    let library = unsafe { cudarc::cublaslt::sys::culib() };
    complete(library, &CUBLASLT, "cublasLt is too old: install 12 or 13")
}

fn searched(folders: &[PathBuf]) -> String {
    if folders.is_empty() {
        return String::new();
    }
    let list: Vec<String> = folders.iter().map(|folder| folder.display().to_string()).collect();
    format!(" (looked into {})", list.join(", "))
}
