//! Which device this worker has.

use ringback_inference_cuda::DeviceInfo;

/// What the operator asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceChoice {
    /// The first GPU if there is one, else the CPU.
    Auto,
    /// The CPU; handlers see no GPU.
    Cpu,
    /// The GPU with this number; the worker refuses to start without it.
    Cuda(u16),
}

impl std::str::FromStr for DeviceChoice {
    type Err = DeviceError;

    fn from_str(text: &str) -> Result<Self, DeviceError> {
        match text {
            "auto" => Ok(Self::Auto),
            "cpu" => Ok(Self::Cpu),
            _ => text
                .strip_prefix("cuda:")
                .and_then(|number| number.parse().ok())
                .map(Self::Cuda)
                .ok_or_else(|| DeviceError::Unreadable { text: text.to_owned() }),
        }
    }
}

/// Why the device cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DeviceError {
    /// Not one of the three forms.
    #[error("worker.device is {text:?}; it must be \"cpu\", \"auto\" or \"cuda:N\"")]
    Unreadable {
        /// What was given.
        text: String,
    },
    /// The number asked for does not exist.
    #[error("worker.device is \"cuda:{wanted}\", but {found}")]
    Missing {
        /// Number asked for.
        wanted: u16,
        /// What was found instead.
        found: String,
    },
}

/// The device in use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    /// For lists, metrics and the handlers' `gpu=`: `cpu`, or the GPU's name.
    pub name: String,
    /// Value of `CUDA_VISIBLE_DEVICES` for children; `None` leaves the worker's own.
    pub visible_devices: Option<String>,
    /// Where NVML finds it; `None` on the CPU.
    pub pci_bus_id: Option<String>,
}

impl Device {
    /// Finds the device. Blocks for as long as the driver takes to initialise.
    ///
    /// # Errors
    /// [`DeviceError::Missing`] when a certain GPU is asked for and not there.
    pub fn detect(choice: DeviceChoice) -> Result<Self, DeviceError> {
        let cpu = |visible_devices| Self { name: "cpu".to_owned(), visible_devices, pci_bus_id: None };
        let gpu = |info: DeviceInfo, visible_devices| Self {
            name: info.name,
            visible_devices,
            pci_bus_id: info.pci_bus_id,
        };
        match choice {
            DeviceChoice::Cpu => Ok(cpu(Some(String::new()))),
            DeviceChoice::Auto => {
                let first = gpus().ok().and_then(|all| all.into_iter().next());
                Ok(first.map_or_else(|| cpu(None), |info| gpu(info, None)))
            }
            DeviceChoice::Cuda(wanted) => {
                let missing = |found: String| DeviceError::Missing { wanted, found };
                let all = gpus().map_err(missing)?;
                let count = all.len();
                let info = all.into_iter().nth(usize::from(wanted));
                let info = info.ok_or_else(|| missing(format!("this host has {count} GPU(s)")))?;
                Ok(gpu(info, Some(wanted.to_string())))
            }
        }
    }
}

/// All GPUs, or why there is none.
fn gpus() -> Result<Vec<DeviceInfo>, String> {
    ringback_inference_cuda::devices().map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn choices_are_read_strictly() {
        assert_eq!("cuda:3".parse(), Ok(DeviceChoice::Cuda(3)));
        assert_eq!("auto".parse(), Ok(DeviceChoice::Auto));
        for bad in ["cuda", "cuda:", "cuda:-1", "gpu", "cuda:99999999"] {
            assert!(bad.parse::<DeviceChoice>().is_err(), "{bad}");
        }
    }

    #[test]
    fn detection_never_panics_and_says_why_a_gpu_is_missing() {
        let auto = Device::detect(DeviceChoice::Auto).expect("auto always finds something");
        assert!(!auto.name.is_empty());
        let none = Device::detect(DeviceChoice::Cuda(u16::MAX)).expect_err("no host has that many");
        assert!(none.to_string().contains("cuda:65535"), "{none}");
        assert_eq!(Device::detect(DeviceChoice::Cpu).map(|d| d.visible_devices), Ok(Some(String::new())));
    }
}
