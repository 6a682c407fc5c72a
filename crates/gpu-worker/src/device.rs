//! Which device this worker has.

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
}

impl Device {
    /// Finds the device. Blocks for as long as the driver takes to initialise.
    ///
    /// # Errors
    /// [`DeviceError::Missing`] when a certain GPU is asked for and not there.
    pub fn detect(choice: DeviceChoice) -> Result<Self, DeviceError> {
        match choice {
            DeviceChoice::Cpu => Ok(Self { name: "cpu".to_owned(), visible_devices: Some(String::new()) }),
            DeviceChoice::Auto => {
                let name = gpus().ok().and_then(|names| names.into_iter().next());
                Ok(Self { name: name.unwrap_or_else(|| "cpu".to_owned()), visible_devices: None })
            }
            DeviceChoice::Cuda(wanted) => {
                let missing = |found: String| DeviceError::Missing { wanted, found };
                let names = gpus().map_err(missing)?;
                let count = names.len();
                let name = names.into_iter().nth(usize::from(wanted));
                let name = name.ok_or_else(|| missing(format!("this host has {count} GPU(s)")))?;
                Ok(Self { name, visible_devices: Some(wanted.to_string()) })
            }
        }
    }
}

/// Names of all GPUs, or why there is none.
fn gpus() -> Result<Vec<String>, String> {
    let found = ringback_inference_cuda::devices().map_err(|error| error.to_string())?;
    Ok(found.into_iter().map(|device| device.name).collect())
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
