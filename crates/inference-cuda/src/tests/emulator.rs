//! The kernels' own source, compiled for the CPU by g++ and run thread by thread (`emulator/`).

use super::rig::Rig;
use super::tools::{need, on_path};
use crate::{
    forward::{Arg, Gemm, Ops},
    kernels::{self, Kernel, KernelShape},
};
use sha2::{Digest, Sha256};
use std::{
    ffi::{CStr, CString, c_char, c_int, c_void},
    path::{Path, PathBuf},
    process::Command,
    sync::{Mutex, MutexGuard, PoisonError},
};

type Launch =
    unsafe extern "C" fn(*const c_char, u32, u32, u32, *mut *mut c_void, *const u32, u32, u32) -> c_int;
type Product = unsafe extern "C" fn(*mut u16, *const u16, *const u16, *const u16, u32, u32, u32);
type LastError = unsafe extern "C" fn() -> *const c_char;

/// The entry points of one compiled emulator. The library stays open.
#[derive(Clone, Copy)]
struct Compiled {
    launch: Launch,
    gemm: Product,
    error: LastError,
}

/// In which order the threads of a block run.
#[derive(Clone, Copy, Debug)]
pub(super) enum Order {
    Ascending,
    Descending,
    /// Another order in each round, from this seed.
    Random(u32),
}

/// 256 bytes, aligned.
#[derive(Clone, Copy)]
#[repr(C, align(256))]
struct Line([u8; 256]);

/// Memory with guards on both sides, aligned as the GPU's allocator does.
struct Block {
    words: Vec<Line>,
    length: usize,
}

fn flat(lines: &[Line]) -> &[u8] {
    // SAFETY: a line is 256 bytes without padding, so that many bytes lie end to end behind the first.
    unsafe { std::slice::from_raw_parts(lines.as_ptr().cast(), lines.len() * 256) }
}

impl Block {
    fn content(&self) -> &[u8] {
        flat(&self.words[1..]).split_at(self.length).0
    }

    /// Whether nothing was written beside the content.
    fn is_sound(&self) -> bool {
        let before = &self.words[0].0;
        let behind = flat(&self.words[1..]).split_at(self.length).1;
        before.iter().chain(behind).all(|byte| *byte == 0xff)
    }
}

/// Emulated kernels with emulated memory.
pub(super) struct Emulator {
    shape: KernelShape,
    compiled: Compiled,
    blocks: Vec<Block>,
    pub(super) order: Order,
    _alone: MutexGuard<'static, ()>,
}

/// The emulator keeps its threads and their shared memory in globals: one test at a time.
static ALONE: Mutex<()> = Mutex::new(());

impl Emulator {
    /// An emulator for kernels of this shape; none, said aloud, where there is no g++.
    pub(super) fn new(shape: KernelShape) -> Option<Self> {
        let program = need(on_path("g++"), "g++", "install g++: the kernels are run on the CPU with it")?;
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        let compiled = load(&build(&program, shape, ""));
        Some(Self { shape, compiled, blocks: Vec::new(), order: Order::Ascending, _alone: alone })
    }

    fn check_guards(&self, after: &str) {
        for (number, block) in self.blocks.iter().enumerate() {
            assert!(block.is_sound(), "{after} wrote beside block {number} of {} bytes", block.length);
        }
    }

    /// Starts a kernel; what it does wrong comes back in words.
    pub(super) fn try_launch(
        &mut self,
        name: &str,
        threads: u32,
        grid: [u32; 2],
        args: &[Arg],
    ) -> Result<(), String> {
        let mut values: Vec<*mut c_void> = Vec::new();
        let mut sizes = Vec::new();
        for arg in args {
            let (value, size): (*const c_void, u32) = match arg {
                Arg::Pointer(value) => (std::ptr::from_ref(value).cast(), 8),
                Arg::U32(value) => (std::ptr::from_ref(value).cast(), 4),
                Arg::F32(value) => (std::ptr::from_ref(value).cast(), 4),
            };
            values.push(value.cast_mut());
            sizes.push(size);
        }
        let order = match self.order {
            Order::Ascending => 0,
            Order::Descending => 1,
            Order::Random(seed) => seed.max(2),
        };
        let c_name = CString::new(name).expect("a name without zeros");
        // SAFETY: the emulator compares number and sizes of the arguments with those of the kernel before it reads
        // them; the addresses among them are the tests' own blocks, or a test of a broken kernel is about to fail.
        let failed = unsafe {
            (self.compiled.launch)(
                c_name.as_ptr(),
                grid[0],
                grid[1],
                threads,
                values.as_mut_ptr(),
                sizes.as_ptr(),
                u32::try_from(sizes.len()).expect("few arguments"),
                order,
            )
        };
        self.check_guards(name);
        if failed == 0 {
            return Ok(());
        }
        // SAFETY: a string of the library that lives until the next failure.
        Err(unsafe { CStr::from_ptr((self.compiled.error)()) }.to_string_lossy().into_owned())
    }
}

/// Folder with a libcuda and a libcublasLt that run these kernels emulated (`emulator/driver.cc`); none, said aloud,
/// where there is no g++.
pub(super) fn driver(shape: KernelShape) -> Option<PathBuf> {
    let program = need(on_path("g++"), "g++", "install g++: the kernels are run on the CPU with it")?;
    let library = build(&program, shape, include_str!("../../emulator/driver.cc"));
    let folder = library.with_extension("libraries");
    std::fs::create_dir_all(&folder).expect("a folder for the driver");
    for name in ["libcuda.so.1", "libcublasLt.so.13"] {
        let link = folder.join(name);
        if let Err(error) = std::os::unix::fs::symlink(&library, &link) {
            assert!(link.exists(), "{}: {error}", link.display());
        }
    }
    Some(folder)
}

/// Compiles the emulator, with `more` behind it, beside the test's program, once per source and shape.
fn build(program: &Path, shape: KernelShape, more: &str) -> PathBuf {
    let mut source = kernels::source(("emulator.h", include_str!("../../emulator/emulator.h")));
    source.push_str(include_str!("../../emulator/emulator.cc"));
    source.push_str(more);
    // As the GPU: products and sums are fused only where the source says so, or the compiler may.
    let options = ["-std=c++17", "-O2", "-fPIC", "-shared", "-U_FORTIFY_SOURCE", "-w", "-fno-gnu-unique"];
    let defines = shape.defines();
    let mut digest = Sha256::new();
    for part in std::iter::once(source.as_str()).chain(options).chain(defines.iter().map(String::as_str)) {
        digest.update(part);
    }
    let key: String = digest.finalize().iter().take(12).map(|byte| format!("{byte:02x}")).collect();
    let folder = std::env::current_exe().expect("the test's path").with_file_name("kernel-emulators");
    std::fs::create_dir_all(&folder).expect("a folder for emulators");
    let library = folder.join(format!("{key}.so"));
    if library.exists() {
        return library;
    }
    let scratch = tempfile::tempdir_in(&folder).expect("a folder");
    let file = scratch.path().join("kernels.cc");
    let made = scratch.path().join("kernels.so");
    // `#pragma once` of a header is a warning in a main file.
    std::fs::write(&file, source.replace("#pragma once", "")).expect("the source");
    let output = Command::new(program)
        .args(options)
        .args(&defines)
        .arg("-Wl,-Bsymbolic")
        .arg(&file)
        .arg("-o")
        .arg(&made)
        .output()
        .expect("g++ starts");
    assert!(output.status.success(), "g++ refuses the kernels:\n{}", String::from_utf8_lossy(&output.stderr));
    std::fs::rename(&made, &library).expect("the emulator in its place");
    library
}

fn load(path: &Path) -> Compiled {
    // SAFETY: our own library, whose initialisers make a few empty lists. It stays open, so its functions do too; their
    // types are written down in emulator.cc.
    unsafe {
        let library = libloading::Library::new(path).expect("the emulator loads");
        let compiled = Compiled {
            launch: *library.get::<Launch>(b"rb_launch").expect("rb_launch"),
            gemm: *library.get::<Product>(b"rb_gemm").expect("rb_gemm"),
            error: *library.get::<LastError>(b"rb_error").expect("rb_error"),
        };
        std::mem::forget(library);
        compiled
    }
}

impl Rig for Emulator {
    fn shape(&self) -> KernelShape {
        self.shape
    }

    fn put(&mut self, bytes: &[u8]) -> u64 {
        let mut words = vec![Line([0xff; 256]); bytes.len().div_ceil(256) + 2];
        for (line, part) in words[1..].iter_mut().zip(bytes.chunks(256)) {
            line.0[..part.len()].copy_from_slice(part);
        }
        let address = words[1..].as_ptr() as u64;
        self.blocks.push(Block { words, length: bytes.len() });
        address
    }

    fn get(&mut self, at: u64, bytes: usize) -> Vec<u8> {
        let block =
            self.blocks.iter().find(|block| block.content().as_ptr() as u64 == at).expect("a known address");
        block.content()[..bytes].to_vec()
    }

    fn launch(&mut self, kernel: Kernel, grid: [u32; 2], args: &[Arg]) {
        if let Err(error) = self.try_launch(kernel.name(), kernel.threads(), grid, args) {
            panic!("{error} ({:?})", self.order);
        }
    }

    fn gemm(&mut self, gemm: Gemm) {
        let bias = gemm.bias.unwrap_or(0) as *const u16;
        // SAFETY: the sizes are those of the blocks that the test has put, or a guard tells.
        unsafe {
            (self.compiled.gemm)(
                gemm.y as *mut u16,
                gemm.x as *const u16,
                gemm.weight as *const u16,
                bias,
                gemm.rows,
                gemm.outputs,
                gemm.inputs,
            );
        }
        self.check_guards("a product");
    }
}

/// The forward pass of the engine, on emulated kernels.
impl Ops for Emulator {
    type Error = String;

    fn launch(&mut self, kernel: Kernel, grid: [u32; 2], args: &[Arg]) -> Result<(), String> {
        self.try_launch(kernel.name(), kernel.threads(), grid, args)
    }

    fn gemm(&mut self, gemm: Gemm) -> Result<(), String> {
        Rig::gemm(self, gemm);
        Ok(())
    }
}

/// Makes a library with nothing in it; false, said aloud, where there is no g++.
pub(super) fn empty_library(path: &Path) -> bool {
    let Some(program) = need(on_path("g++"), "g++", "install g++: a library is made with it") else {
        return false;
    };
    let source = path.with_extension("cc");
    std::fs::write(&source, "").expect("an empty source");
    let made =
        Command::new(program).args(["-shared", "-o"]).arg(path).arg(&source).status().expect("g++ starts");
    assert!(made.success());
    true
}
