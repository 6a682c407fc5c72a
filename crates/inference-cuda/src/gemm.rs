//! Matrix products by cublasLt.
//!
//! Rows of activations `x[rows][inputs]` are, to cublasLt's eyes, a matrix of `inputs` by `rows` in column order, and
//! PyTorch's `weight[outputs][inputs]` one of `inputs` by `outputs`. So `yᵀ = weightᵀᵀ · xᵀ` asks for the first factor
//! transposed and the second as it is, the form that tensor cores read without a shuffle, and nothing is ever moved.

use crate::{error::CudaError, forward::Gemm, memory::GEMM_WORKSPACE_BYTES, precision::Precision};
use cudarc::{
    cublaslt::{
        result::{self, CublasError},
        sys::{
            self, cublasComputeType_t, cublasLtEpilogue_t, cublasLtMatmulDescAttributes_t, cublasStatus_t,
            cudaDataType_t,
        },
    },
    driver::sys::CUstream,
};
use std::{collections::HashMap, ffi::c_void, mem::size_of};

/// `CUBLAS_OP_T`, an enum of cuBLAS that cudarc has no name for here.
const TRANSPOSED: i32 = 1;

/// A product's size, and whether a bias is added.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Key {
    rows: u32,
    outputs: u32,
    inputs: u32,
    bias: bool,
}

/// The library's handle and what was learnt about each size. Owned by the engine, used by one thread at a time.
pub(crate) struct Gemms {
    handle: sys::cublasLtHandle_t,
    precision: Precision,
    workspace: u64,
    known: HashMap<Key, Product>,
}

// SAFETY: the handle and the descriptors are tied to no thread, only to one user at a time, and every use of them goes
// through `&mut self`.
unsafe impl Send for Gemms {}

/// One size: descriptors and the algorithm that the library's heuristic chose.
struct Product {
    operation: Operation,
    weight: Layout,
    x: Layout,
    y: Layout,
    algorithm: sys::cublasLtMatmulAlgo_t,
}

struct Operation(sys::cublasLtMatmulDesc_t);
struct Layout(sys::cublasLtMatrixLayout_t);
struct Preference(sys::cublasLtMatmulPreference_t);

impl Drop for Operation {
    fn drop(&mut self) {
        // SAFETY: made by create_matmul_desc, freed nowhere else.
        let _ = unsafe { result::destroy_matmul_desc(self.0) };
    }
}

impl Drop for Layout {
    fn drop(&mut self) {
        // SAFETY: made by create_matrix_layout, freed nowhere else.
        let _ = unsafe { result::destroy_matrix_layout(self.0) };
    }
}

impl Drop for Preference {
    fn drop(&mut self) {
        // SAFETY: made by create_matmul_pref, freed nowhere else.
        let _ = unsafe { result::destroy_matmul_pref(self.0) };
    }
}

impl Drop for Gemms {
    fn drop(&mut self) {
        self.known.clear();
        // SAFETY: made by create_handle, freed nowhere else, and the engine has waited for its streams before.
        let _ = unsafe { result::destroy_handle(self.handle) };
    }
}

impl Operation {
    fn set<T>(&self, attribute: cublasLtMatmulDescAttributes_t, value: &T) -> Result<(), CublasError> {
        let bytes = std::ptr::from_ref(value).cast::<c_void>();
        // SAFETY: the descriptor lives; the library copies `size_of::<T>()` bytes from a living value, and checks that
        // this is the attribute's size.
        unsafe { result::set_matmul_desc_attribute(self.0, attribute, bytes, size_of::<T>()) }
    }
}

fn failed(call: &'static str) -> impl Fn(CublasError) -> CudaError {
    move |error| {
        let lasting = matches!(
            error.0,
            cublasStatus_t::CUBLAS_STATUS_INVALID_VALUE
                | cublasStatus_t::CUBLAS_STATUS_ARCH_MISMATCH
                | cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED
        );
        CudaError::Cublas { call, detail: format!("{:?}", error.0), lasting }
    }
}

fn data_type(precision: Precision) -> cudaDataType_t {
    match precision {
        Precision::Fp16 => cudaDataType_t::CUDA_R_16F,
        Precision::Bf16 => cudaDataType_t::CUDA_R_16BF,
    }
}

impl Gemms {
    /// `workspace` is an address with [`GEMM_WORKSPACE_BYTES`]. The library has been found before, and a context is
    /// current on this thread.
    pub(crate) fn new(precision: Precision, workspace: u64) -> Result<Self, CudaError> {
        let handle = result::create_handle().map_err(failed("cublasLtCreate"))?;
        Ok(Self { handle, precision, workspace, known: HashMap::new() })
    }

    /// Starts a product on a stream.
    ///
    /// # Safety
    /// The addresses of `gemm` are those of device memory of the sizes that it names, all of it alive until the stream
    /// has passed this point; so is the workspace, which no other stream uses meanwhile. The stream belongs to the
    /// context that is current on this thread.
    pub(crate) unsafe fn start(&mut self, gemm: Gemm, stream: CUstream) -> Result<(), CudaError> {
        let key =
            Key { rows: gemm.rows, outputs: gemm.outputs, inputs: gemm.inputs, bias: gemm.bias.is_some() };
        if !self.known.contains_key(&key) {
            let product = self.learn(key).map_err(failed("cublasLtMatmulAlgoGetHeuristic"))?;
            self.known.insert(key, product);
        }
        let product = &self.known[&key];
        if let Some(bias) = gemm.bias {
            let attribute = cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_BIAS_POINTER;
            product.operation.set(attribute, &bias).map_err(failed("the bias"))?;
        }
        let (one, zero) = (1.0_f32, 0.0_f32);
        let address = |at: u64| at as *const c_void;
        // SAFETY: descriptors, algorithm and handle are alive and were made for this size. The scalars are read before
        // the call returns (host pointer mode). The memory is the caller's promise; with beta = 0, C is not read.
        unsafe {
            result::matmul(
                self.handle,
                product.operation.0,
                std::ptr::from_ref(&one).cast(),
                std::ptr::from_ref(&zero).cast(),
                address(gemm.weight),
                product.weight.0,
                address(gemm.x),
                product.x.0,
                address(gemm.y),
                product.y.0,
                gemm.y as *mut c_void,
                product.y.0,
                &product.algorithm,
                self.workspace as *mut c_void,
                GEMM_WORKSPACE_BYTES as usize,
                stream.cast(),
            )
        }
        .map_err(failed("cublasLtMatmul"))
    }

    fn learn(&self, key: Key) -> Result<Product, CublasError> {
        let compute = cublasComputeType_t::CUBLAS_COMPUTE_32F;
        let operation = Operation(result::create_matmul_desc(compute, cudaDataType_t::CUDA_R_32F)?);
        operation.set(cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSA, &TRANSPOSED)?;
        if key.bias {
            let epilogue = cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BIAS;
            operation.set(cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue)?;
        }
        let layout = |rows: u32, columns: u32| {
            result::create_matrix_layout(data_type(self.precision), rows.into(), columns.into(), rows.into())
                .map(Layout)
        };
        let (weight, x) = (layout(key.inputs, key.outputs)?, layout(key.inputs, key.rows)?);
        let y = layout(key.outputs, key.rows)?;
        let preference = Preference(result::create_matmul_pref()?);
        let attribute = sys::cublasLtMatmulPreferenceAttributes_t::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES;
        let bytes = GEMM_WORKSPACE_BYTES as usize;
        // SAFETY: the preference lives; the library copies the bytes of a living integer of the attribute's size.
        unsafe {
            result::set_matmul_pref_attribute(
                preference.0,
                attribute,
                std::ptr::from_ref(&bytes).cast(),
                size_of::<usize>(),
            )?;
        }
        // SAFETY: all handles are alive.
        let chosen = unsafe {
            result::get_matmul_algo_heuristic(
                self.handle,
                operation.0,
                weight.0,
                x.0,
                y.0,
                y.0,
                preference.0,
            )?
        };
        Ok(Product { operation, weight, x, y, algorithm: chosen.algo })
    }
}
