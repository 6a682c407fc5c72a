//! What the driver's management library (NVML) says about this worker's GPU, as metrics.
//!
//! NVML is loaded at run time. Without it, or where it does not know a figure (the utilisation of a MIG slice, say), that
//! figure is absent rather than zero: unknown is not idle.

use std::sync::Arc;
use std::time::Duration;

use metrics::gauge;
use nvml_wrapper::{Nvml, enum_wrappers::device::TemperatureSensor, error::NvmlError};
use ringback_service_runtime::Shutdown;

/// As often as Prometheus usually asks.
const EVERY: Duration = Duration::from_secs(10);

/// What was read; `None` where NVML does not know.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Figures {
    /// Share of the last sampling period in which a kernel ran, 0 to 1.
    utilization_ratio: Option<f64>,
    memory_used_bytes: Option<f64>,
    memory_total_bytes: Option<f64>,
    power_watts: Option<f64>,
    temperature_celsius: Option<f64>,
}

/// Sets the metrics of the GPU at `pci_bus_id` until `stop`. Says once why there are none.
pub(crate) async fn watch(pci_bus_id: String, stop: Shutdown) {
    let nvml = match tokio::task::spawn_blocking(Nvml::init).await {
        Ok(Ok(nvml)) => Arc::new(nvml),
        Ok(Err(error)) => {
            tracing::info!(%error, "NVML cannot be used; figures of the GPU are unknown");
            return;
        }
        Err(_) => return,
    };
    let id: Arc<str> = pci_bus_id.into();
    loop {
        let (library, gpu) = (Arc::clone(&nvml), Arc::clone(&id));
        match tokio::task::spawn_blocking(move || read(&library, &gpu)).await {
            Ok(Ok(figures)) => show(&id, figures),
            Ok(Err(error)) => {
                tracing::warn!(%error, gpu = &*id, "NVML does not answer; figures of the GPU are unknown");
                show(&id, Figures::default());
            }
            Err(_) => return,
        }
        tokio::select! {
            () = stop.triggered() => return,
            () = tokio::time::sleep(EVERY) => {}
        }
    }
}

fn read(nvml: &Nvml, pci_bus_id: &str) -> Result<Figures, NvmlError> {
    let gpu = nvml.device_by_pci_bus_id(pci_bus_id)?;
    let memory = gpu.memory_info().ok();
    Ok(Figures {
        utilization_ratio: gpu.utilization_rates().ok().map(|u| f64::from(u.gpu) / 100.0),
        memory_used_bytes: memory.as_ref().map(|m| m.used as f64),
        memory_total_bytes: memory.as_ref().map(|m| m.total as f64),
        power_watts: gpu.power_usage().ok().map(|mw| f64::from(mw) / 1000.0),
        temperature_celsius: gpu.temperature(TemperatureSensor::Gpu).ok().map(f64::from),
    })
}

/// A figure that is not known any more becomes NaN: a gauge cannot be taken back.
fn show(pci_bus_id: &str, figures: Figures) {
    for (name, value) in [
        ("ringback_gpu_utilization_ratio", figures.utilization_ratio),
        ("ringback_gpu_memory_used_bytes", figures.memory_used_bytes),
        ("ringback_gpu_memory_total_bytes", figures.memory_total_bytes),
        ("ringback_gpu_power_watts", figures.power_watts),
        ("ringback_gpu_temperature_celsius", figures.temperature_celsius),
    ] {
        gauge!(name, "gpu" => pci_bus_id.to_owned()).set(value.unwrap_or(f64::NAN));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// On a host without a driver this ends by itself; on one with a driver it ends when it is told to.
    #[tokio::test]
    async fn it_ends_with_or_without_a_driver_and_never_panics() {
        let stop = Shutdown::new();
        let watching = tokio::spawn(watch("00000000:ff:1f.0".to_owned(), stop.clone()));
        stop.trigger();
        tokio::time::timeout(Duration::from_secs(30), watching).await.unwrap().unwrap();
    }
}
