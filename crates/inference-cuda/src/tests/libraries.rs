//! A host without driver, GPU or libraries: everything is told in words, nothing panics.

use super::{emulator, models, nvrtc};
use crate::{Availability, CudaEngine, CudaError, CudaOptions, devices, is_available, library};
use ringback_inference::Task;
use std::{path::Path, process::Command, sync::Arc};

fn driver_is_here() -> bool {
    let here = library::require_driver().is_ok();
    if here {
        eprintln!("\n======== SKIPPED: this host has a CUDA driver ========\n");
    }
    here
}

#[test]
fn without_a_driver_everything_says_so() {
    if driver_is_here() {
        return;
    }
    let Availability::Unavailable { reasons } = is_available(&[]) else { panic!("there is no driver") };
    assert!(reasons[0].contains("libcuda.so.1"), "{reasons:?}");
    assert!(devices().expect_err("no driver").to_string().contains("libcuda.so.1"));
    let encoder = Arc::new(models::tiny(Task::Embed, 1));
    let error = CudaEngine::load(encoder, &CudaOptions::default()).map(drop).expect_err("no driver");
    assert!(matches!(error, CudaError::Unavailable { .. }), "{error}");
}

#[test]
fn without_cublaslt_the_package_and_the_folders_are_named() {
    if driver_is_here() {
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let error = library::require_cublaslt(&[folder.path().to_owned()]).expect_err("not here");
    for part in
        ["libcublasLt.so.13", "nvidia-cublas", "LD_LIBRARY_PATH", &folder.path().display().to_string()]
    {
        assert!(error.contains(part), "{part} is not named: {error}");
    }
    // A file that is no library is passed over.
    std::fs::write(folder.path().join("libcublasLt.so.13"), b"no ELF").expect("a file");
    assert!(library::require_cublaslt(&[folder.path().to_owned()]).is_err());
}

/// Runs a test of this file again, with another library path.
fn again(child: &str, folder: &Path) {
    let output = Command::new(std::env::current_exe().expect("the test's path"))
        .args(["--include-ignored", "--exact", "--nocapture", &format!("tests::libraries::{child}")])
        .env("LD_LIBRARY_PATH", folder)
        .env("RB_CHILD", "1")
        .output()
        .expect("the test starts again");
    let text =
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success() && text.contains("1 passed"), "{child}:\n{text}");
}

#[test]
fn without_nvrtc_the_package_is_named_and_a_folder_helps() {
    let folder = tempfile::tempdir().expect("a folder");
    again("child_without_nvrtc", folder.path());
}

#[test]
#[ignore = "a part of the test above"]
fn child_without_nvrtc() {
    if std::env::var_os("RB_CHILD").is_none() {
        return;
    }
    let Err(error) = library::require_nvrtc(&[]) else {
        eprintln!("\n======== SKIPPED: this host has NVRTC on the loader's path ========\n");
        return;
    };
    assert!(error.contains("nvidia-cuda-nvrtc") && error.contains("LD_LIBRARY_PATH"), "{error}");
    let Some(folder) = nvrtc::folder() else { return };
    library::require_nvrtc(&[folder]).expect("found in the folder");
}

#[test]
fn a_driver_that_is_too_old_is_told_by_what_it_lacks() {
    let folder = tempfile::tempdir().expect("a folder");
    if emulator::empty_library(&folder.path().join("libcuda.so.1")) {
        again("child_with_an_old_driver", folder.path());
    }
}

#[test]
#[ignore = "a part of the test above"]
fn child_with_an_old_driver() {
    if std::env::var_os("RB_CHILD").is_none() {
        return;
    }
    let error = library::require_driver().expect_err("an empty library is no driver");
    assert!(error.contains("too old") && error.contains("cuInit"), "{error}");
    assert!(!is_available(&[]).is_available());
}
