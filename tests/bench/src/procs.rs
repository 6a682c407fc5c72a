//! CPU time and memory of the processes that take part, read from /proc.

use std::collections::BTreeMap;
use std::fs;

use serde::Serialize;

/// A named group of processes, for example the postmaster with its children.
#[derive(Debug, Clone)]
pub struct Group {
    /// The name in the report.
    pub name: String,
    root: u32,
    with_descendants: bool,
}

/// Memory of a group. Peak is the sum of each process's own high-water mark.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub struct Memory {
    /// Resident now.
    pub resident_bytes: u64,
    /// Highest resident so far.
    pub peak_bytes: u64,
}

/// CPU clocks at one moment.
#[derive(Debug, Clone, Default)]
pub struct Snapshot {
    cpu_s: BTreeMap<String, f64>,
    machine_busy_s: f64,
    at: Option<std::time::Instant>,
}

/// CPU spent between two snapshots.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Spent {
    /// By group, in seconds.
    pub cpu_s: BTreeMap<String, f64>,
    /// Share of all cores that processes outside the bench took, 0 to 1: the noise of the machine.
    pub others_share: f64,
}

impl Group {
    /// One process alone.
    pub fn single(name: &str, pid: u32) -> Self {
        Self { name: name.to_owned(), root: pid, with_descendants: false }
    }

    /// A process and everything below it.
    pub fn tree(name: &str, pid: u32) -> Self {
        Self { name: name.to_owned(), root: pid, with_descendants: true }
    }

    fn pids(&self) -> Vec<u32> {
        let mut pids = vec![self.root];
        if self.with_descendants {
            pids.extend(descendants(self.root).into_iter().map(|(pid, _)| pid));
        }
        pids
    }

    /// Resident memory now and at its highest.
    pub fn memory(&self) -> Memory {
        self.pids().into_iter().fold(Memory::default(), |sum, pid| {
            let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
            Memory {
                resident_bytes: sum.resident_bytes + kib_line(&status, "VmRSS:") * 1024,
                peak_bytes: sum.peak_bytes + kib_line(&status, "VmHWM:") * 1024,
            }
        })
    }
}

/// Takes the clocks of all groups.
pub fn snapshot(groups: &[Group]) -> Snapshot {
    let cpu_s = groups
        .iter()
        .map(|group| (group.name.clone(), group.pids().into_iter().filter_map(cpu_seconds).sum()))
        .collect();
    Snapshot { cpu_s, machine_busy_s: machine_busy_seconds(), at: Some(std::time::Instant::now()) }
}

/// What was spent since `before`.
pub fn spent(before: &Snapshot, groups: &[Group]) -> Spent {
    let after = snapshot(groups);
    let cpu_s: BTreeMap<String, f64> = after
        .cpu_s
        .iter()
        .map(|(name, seconds)| {
            (name.clone(), (seconds - before.cpu_s.get(name).copied().unwrap_or(0.0)).max(0.0))
        })
        .collect();
    let wall_s = before.at.map_or(0.0, |at| at.elapsed().as_secs_f64());
    let cores = std::thread::available_parallelism().map_or(1, usize::from) as f64;
    let ours: f64 = cpu_s.values().sum();
    let others_s = (after.machine_busy_s - before.machine_busy_s - ours).max(0.0);
    let others_share = if wall_s > 0.0 { (others_s / (wall_s * cores)).min(1.0) } else { 0.0 };
    Spent { cpu_s, others_share }
}

/// All processes below one, with their names.
pub fn descendants(root: u32) -> Vec<(u32, String)> {
    let mut found = children(root);
    let mut next = 0;
    while next < found.len() {
        found.extend(children(found[next].0));
        next += 1;
    }
    found
}

/// Direct children with their names.
fn children(parent: u32) -> Vec<(u32, String)> {
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok())
        .filter_map(|pid| {
            let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
            let (name, rest) = split_stat(&stat)?;
            let ppid: u32 = rest.split_ascii_whitespace().nth(1)?.parse().ok()?;
            (ppid == parent).then(|| (pid, name.to_owned()))
        })
        .collect()
}

/// `pid (comm) state ppid …`: comm may hold spaces and brackets, so the last bracket counts.
fn split_stat(stat: &str) -> Option<(&str, &str)> {
    let open = stat.find('(')?;
    let close = stat.rfind(')')?;
    Some((stat.get(open + 1..close)?, stat.get(close + 1..)?))
}

/// User and system time of a process and of its children that were waited for (proc(5), fields 14 to 17).
fn cpu_seconds(pid: u32) -> Option<f64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, rest) = split_stat(&stat)?;
    let ticks: u64 =
        rest.split_ascii_whitespace().skip(11).take(4).filter_map(|text| text.parse::<u64>().ok()).sum();
    Some(ticks as f64 / rustix::param::clock_ticks_per_second() as f64)
}

/// Time that all cores spent on work (proc_stat(5): user, nice, system, irq, softirq, steal).
fn machine_busy_seconds() -> f64 {
    let stat = fs::read_to_string("/proc/stat").unwrap_or_default();
    let fields: Vec<u64> = stat
        .lines()
        .next()
        .unwrap_or_default()
        .split_ascii_whitespace()
        .skip(1)
        .filter_map(|text| text.parse().ok())
        .collect();
    let ticks: u64 = [0, 1, 2, 5, 6, 7].iter().filter_map(|at| fields.get(*at)).sum();
    ticks as f64 / rustix::param::clock_ticks_per_second() as f64
}

fn kib_line(status: &str, key: &str) -> u64 {
    status
        .lines()
        .find_map(|line| line.strip_prefix(key))
        .and_then(|rest| rest.split_ascii_whitespace().next())
        .and_then(|text| text.parse().ok())
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_brackets_does_not_shift_the_fields() {
        let (name, rest) = split_stat("12 (a) b (c) S 7 1 2").unwrap();
        assert_eq!((name, rest.split_ascii_whitespace().nth(1)), ("a) b (c", Some("7")));
    }

    #[test]
    fn sees_its_own_work_and_memory() {
        let group = [Group::single("self", std::process::id())];
        let before = snapshot(&group);
        let mut work = 0_u64;
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
        while spent(&before, &group).cpu_s["self"] < 0.05 {
            work = std::hint::black_box(work.wrapping_mul(31).wrapping_add(7));
            assert!(std::time::Instant::now() < deadline, "no CPU time seen for a busy process");
        }
        let memory = group[0].memory();
        assert!(memory.resident_bytes > 100_000 && memory.peak_bytes >= memory.resident_bytes);
    }

    #[test]
    fn a_tree_holds_its_children() {
        let mut shell = std::process::Command::new("sh").args(["-c", "sleep 30 & wait"]).spawn().unwrap();
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
        // The shell's own child shows up a moment later.
        let sleep = loop {
            let below = descendants(std::process::id());
            if let Some((pid, _)) = below.into_iter().find(|(_, name)| name == "sleep") {
                break pid;
            }
            assert!(std::time::Instant::now() < deadline, "no grandchild");
            std::thread::yield_now();
        };
        let pids = Group::tree("self", std::process::id()).pids();
        let found = [std::process::id(), shell.id(), sleep].iter().all(|pid| pids.contains(pid));
        rustix::process::kill_process(
            rustix::process::Pid::from_raw(sleep.cast_signed()).unwrap(),
            rustix::process::Signal::KILL,
        )
        .unwrap();
        shell.wait().unwrap();
        assert!(found);
    }
}
