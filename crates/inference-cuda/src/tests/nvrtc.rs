//! The kernels compiled for real GPUs, without one.

use super::tools::{need, tool};
use crate::{
    compiler,
    error::CudaError,
    kernels::{Kernel, KernelShape},
    library,
    precision::Precision,
};
use std::path::PathBuf;

/// The folder of the NVRTC that tools/setup has fetched.
pub(super) fn folder() -> Option<PathBuf> {
    need(fetched(), "NVRTC (libnvrtc.so.13)", "run tools/setup nvrtc")
}

/// The same, for those who can do without.
pub(super) fn fetched() -> Option<PathBuf> {
    let environments = std::fs::read_dir(tool("venv-nvrtc/lib")).ok();
    environments
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path().join("site-packages/nvidia/cu13/lib"))
        .find(|folder| folder.join("libnvrtc.so.13").is_file())
}

const MINI_LM: KernelShape =
    KernelShape { hidden: 384, head_dim: 32, intermediate: 1536, precision: Precision::Fp16 };
const BASE: KernelShape =
    KernelShape { hidden: 768, head_dim: 64, intermediate: 3072, precision: Precision::Bf16 };
const LARGE: KernelShape =
    KernelShape { hidden: 1024, head_dim: 64, intermediate: 4096, precision: Precision::Fp16 };

/// What ptxas says of a kernel.
#[derive(Debug, Default)]
struct Used {
    registers: u32,
    spilled: u32,
    shared: u32,
}

/// The number before `unit` in the log of one kernel.
fn number_before(text: &str, unit: &str) -> Option<u32> {
    let (before, _) = text.split_once(unit)?;
    before.split_whitespace().next_back()?.parse().ok()
}

fn used(log: &str, kernel: Kernel) -> Used {
    let begin = format!("Compiling entry function '{}'", kernel.name());
    let part =
        log.split(&begin).nth(1).unwrap_or_else(|| panic!("{} is not in the log:\n{log}", kernel.name()));
    let part = part.split("Compiling entry function").next().unwrap_or_default();
    Used {
        registers: number_before(&part.replace("Used ", " "), " registers").expect("registers"),
        spilled: number_before(part, " bytes spill stores").expect("spill stores")
            + number_before(part, " bytes spill loads").expect("spill loads"),
        shared: number_before(part, " bytes smem").unwrap_or(0),
    }
}

fn compiles(shape: KernelShape, archs: &[&str]) {
    let Some(folder) = folder() else { return };
    library::require_nvrtc(&[folder]).expect("NVRTC loads from a folder outside of the loader's path");
    for arch in archs {
        let compiled =
            compiler::compile_kernels(shape, arch).unwrap_or_else(|error| panic!("{arch}: {error}"));
        assert!(compiled.cubin.starts_with(b"\x7fELF"), "{arch}: a cubin is an ELF file");
        for kernel in Kernel::ALL {
            let used = used(&compiled.log, kernel);
            assert_eq!(used.spilled, 0, "{arch} {shape:?} {kernel:?} spills registers: {used:?}");
            // A static limit of all architectures.
            assert!(used.shared <= 48 << 10, "{arch} {shape:?} {kernel:?}: {used:?}");
            // So that a multiprocessor (64 Ki registers) holds 512 threads of attention, 1024 of all others.
            let most = if kernel == Kernel::Attention { 128 } else { 64 };
            assert!(used.registers <= most, "{arch} {shape:?} {kernel:?}: {used:?}");
        }
    }
}

#[test]
fn kernels_of_small_models_compile_for_all_architectures() {
    compiles(MINI_LM, &["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"]);
}

#[test]
fn kernels_of_base_models_compile() {
    compiles(BASE, &["sm_80", "sm_90"]);
}

#[test]
fn kernels_of_large_models_compile() {
    compiles(LARGE, &["sm_90"]);
}

#[test]
fn an_unknown_architecture_and_a_broken_source_are_errors_in_words() {
    let Some(folder) = folder() else { return };
    library::require_nvrtc(&[folder]).expect("NVRTC loads");
    let unknown = compiler::compile_kernels(MINI_LM, "sm_7").expect_err("no such architecture");
    assert!(
        matches!(unknown, CudaError::Compile { .. }) && unknown.to_string().contains("sm_7"),
        "{unknown}"
    );
    let broken = compiler::compile("__global__ void k( { }", MINI_LM, "sm_90").expect_err("no C++");
    assert!(broken.to_string().contains("error"), "the compiler's words: {broken}");
}

#[test]
fn the_compiler_tells_its_version() {
    let Some(folder) = folder() else { return };
    library::require_nvrtc(&[folder]).expect("NVRTC loads");
    assert!(compiler::version().expect("a version").0 >= 12);
}
