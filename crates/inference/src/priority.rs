//! The priority of the threads that compute.

/// Added to the nice value of a thread that computes. Those threads keep every core busy for as long as there is work,
/// and may share the machine with the control plane: beside one of them a thread of the usual priority gets three
/// quarters of a core and runs as soon as it wakes, while on an idle machine they lose nothing.
#[cfg(target_os = "linux")]
const NICER_BY: i32 = 5;

/// Lowers the priority of the calling thread alone.
#[cfg(target_os = "linux")]
pub(crate) fn lower() {
    use rustix::process::{getpriority_process, setpriority_process};
    // Linux keeps a nice value per thread and takes the id of a thread for that of a process here.
    let thread = Some(rustix::thread::gettid());
    let lowered = getpriority_process(thread)
        .and_then(|nice| setpriority_process(thread, nice.saturating_add(NICER_BY).min(19)));
    if let Err(error) = lowered {
        tracing::debug!(%error, "a thread of the encoder keeps its priority");
    }
}

/// Elsewhere a priority belongs to the whole process, the control plane included.
#[cfg(not(target_os = "linux"))]
pub(crate) fn lower() {}
