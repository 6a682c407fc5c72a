//! Whether there is a GPU to use, and which.

use crate::{error::CudaError, library};
use cudarc::driver::{
    result,
    sys::{CUdevice, CUdevice_attribute},
};
use std::path::PathBuf;

/// A GPU of this host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceInfo {
    /// Its number, as in `cuda:N`.
    pub ordinal: usize,
    /// Its name.
    pub name: String,
    /// Compute capability: major and minor part.
    pub compute_capability: (i32, i32),
    /// Memory in all.
    pub memory_bytes: u64,
    /// Its place on the bus as `domain:bus:device.0` in hexadecimal, by which other tools know it.
    pub pci_bus_id: Option<String>,
}

/// Whether the engine can run on this host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Availability {
    /// Driver, libraries and at least one GPU are there.
    Available {
        /// The GPUs.
        devices: Vec<DeviceInfo>,
    },
    /// Something is missing.
    Unavailable {
        /// Each missing thing in words, with what to do.
        reasons: Vec<String>,
    },
}

impl Availability {
    /// Whether it is available.
    pub fn is_available(&self) -> bool {
        matches!(self, Self::Available { .. })
    }
}

/// Looks for driver, GPUs and libraries. `library_dirs` are looked into before the loader's path. Never panics; blocks
/// for as long as the driver takes to start.
pub fn is_available(library_dirs: &[PathBuf]) -> Availability {
    let mut reasons = Vec::new();
    let found = match devices() {
        Ok(found) => found,
        Err(CudaError::Unavailable { reasons: more }) => {
            reasons.extend(more);
            Vec::new()
        }
        Err(error) => {
            reasons.push(error.to_string());
            Vec::new()
        }
    };
    reasons.extend(library::require_nvrtc(library_dirs).err());
    reasons.extend(library::require_cublaslt(library_dirs).err());
    if reasons.is_empty() {
        Availability::Available { devices: found }
    } else {
        Availability::Unavailable { reasons }
    }
}

/// The GPUs of this host; at least one.
///
/// # Errors
/// [`CudaError::Unavailable`] without a driver or a GPU.
pub fn devices() -> Result<Vec<DeviceInfo>, CudaError> {
    let unavailable = |reason: String| CudaError::Unavailable { reasons: vec![reason] };
    library::require_driver().map_err(unavailable)?;
    let failed = |error: result::DriverError| unavailable(format!("the CUDA driver says {:?}", error.0));
    result::init().map_err(failed)?;
    let count = result::device::get_count().map_err(failed)?;
    if count == 0 {
        return Err(unavailable("the CUDA driver sees no GPU (CUDA_VISIBLE_DEVICES may hide it)".to_owned()));
    }
    (0..count).map(|ordinal| device(ordinal).map_err(failed)).collect()
}

fn device(ordinal: i32) -> Result<DeviceInfo, result::DriverError> {
    let device = result::device::get(ordinal)?;
    // SAFETY: `device` is a handle that the driver has just given.
    let (major, minor, memory) = unsafe {
        (
            result::device::get_attribute(
                device,
                CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
            )?,
            result::device::get_attribute(
                device,
                CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
            )?,
            result::device::total_mem(device)?,
        )
    };
    Ok(DeviceInfo {
        ordinal: usize::try_from(ordinal).unwrap_or_default(),
        name: result::device::get_name(device)?,
        compute_capability: (major, minor),
        memory_bytes: memory as u64,
        pci_bus_id: pci_bus_id(device),
    })
}

fn pci_bus_id(device: CUdevice) -> Option<String> {
    let part = |attribute| {
        // SAFETY: `device` is a handle that the driver has given.
        unsafe { result::device::get_attribute(device, attribute) }.ok()
    };
    let domain = part(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_PCI_DOMAIN_ID)?;
    let bus = part(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_PCI_BUS_ID)?;
    let slot = part(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_PCI_DEVICE_ID)?;
    Some(format!("{domain:08x}:{bus:02x}:{slot:02x}.0"))
}

/// The GPU with this number, if the kernels run on it.
pub(crate) fn usable(ordinal: usize) -> Result<DeviceInfo, CudaError> {
    let all = devices()?;
    let count = all.len();
    let device = all.into_iter().nth(ordinal).ok_or(CudaError::NoSuchDevice { ordinal, count })?;
    let (major, minor) = device.compute_capability;
    if major < 8 {
        return Err(CudaError::TooOld { ordinal, name: device.name, major, minor });
    }
    Ok(device)
}
