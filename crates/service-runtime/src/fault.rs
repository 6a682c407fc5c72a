//! Crash points for the tests: named places where a process can be made to die or to wait.
//!
//! With the feature `faults`, the variable `RINGBACK_FAULT` holds a comma-separated list of `name@N` (the N-th hit of
//! that point, from 1, ends the process with SIGKILL) and `name@N:fail` (the N-th hit of a point that can fail does) and `name@N:pause=FILE` (the N-th hit writes `FILE.hit` and
//! waits until FILE exists). Without the feature a point costs nothing and cannot be triggered.

/// Marks a crash point. Place one before and one after each commit, publish, acknowledgement and POST.
#[cfg(not(feature = "faults"))]
#[inline(always)]
pub fn point(_name: &'static str) {}

/// Marks a crash point. Place one before and one after each commit, publish, acknowledgement and POST.
#[cfg(feature = "faults")]
pub fn point(name: &'static str) {
    let _ = armed::hit(name);
}

/// Whether something is to fail here, at a hit that `name@N:fail` names.
#[cfg(not(feature = "faults"))]
#[inline(always)]
#[must_use]
pub fn fails(_name: &'static str) -> bool {
    false
}

/// Whether something is to fail here, at a hit that `name@N:fail` names.
#[cfg(feature = "faults")]
#[must_use]
pub fn fails(name: &'static str) -> bool {
    armed::hit(name)
}

/// Whether crash points are compiled in.
#[must_use]
pub const fn enabled() -> bool {
    cfg!(feature = "faults")
}

#[cfg(feature = "faults")]
mod armed {
    use std::path::PathBuf;
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::time::Duration;

    enum Action {
        Kill,
        Pause(PathBuf),
        Fail,
    }

    struct Fault {
        name: String,
        at: u64,
        action: Action,
        hits: AtomicU64,
    }

    fn faults() -> &'static [Fault] {
        static FAULTS: OnceLock<Vec<Fault>> = OnceLock::new();
        FAULTS.get_or_init(|| {
            let text = std::env::var("RINGBACK_FAULT").unwrap_or_default();
            let mut faults = Vec::new();
            for part in text.split(',').filter(|part| !part.trim().is_empty()) {
                match parse(part.trim()) {
                    Some(fault) => faults.push(fault),
                    // A mistyped point would make a crash test pass without its crash.
                    None => {
                        eprintln!(
                            "RINGBACK_FAULT: cannot read `{part}`, expected name@N, name@N:fail or name@N:pause=FILE"
                        );
                        std::process::exit(64);
                    }
                }
            }
            faults
        })
    }

    fn parse(part: &str) -> Option<Fault> {
        let (name, rest) = part.split_once('@')?;
        let (at, action) = match rest.split_once(':') {
            None => (rest, Action::Kill),
            Some((at, "fail")) => (at, Action::Fail),
            Some((at, option)) => (at, Action::Pause(PathBuf::from(option.strip_prefix("pause=")?))),
        };
        let at = at.parse().ok().filter(|&at| at > 0)?;
        Some(Fault { name: name.to_owned(), at, action, hits: AtomicU64::new(0) })
    }

    /// Whether what was hit is to fail.
    pub(super) fn hit(name: &'static str) -> bool {
        let mut fails = false;
        for fault in faults().iter().filter(|fault| fault.name == name) {
            if fault.hits.fetch_add(1, Ordering::SeqCst) + 1 != fault.at {
                continue;
            }
            match &fault.action {
                Action::Kill => {
                    let _ = rustix::process::kill_process(
                        rustix::process::getpid(),
                        rustix::process::Signal::KILL,
                    );
                    // The signal may reach another thread first; this one must not take another step.
                    loop {
                        std::thread::park();
                    }
                }
                Action::Fail => fails = true,
                Action::Pause(file) => {
                    let mut mark = file.clone().into_os_string();
                    mark.push(".hit");
                    let _ = std::fs::write(mark, b"");
                    while !file.exists() {
                        std::thread::sleep(Duration::from_millis(5));
                    }
                }
            }
        }
        fails
    }
}
