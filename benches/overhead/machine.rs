//! What a figure means nothing without: the machine, its file systems, the versions, the day.

use std::fs::read_to_string;
use std::path::Path;
use std::thread::available_parallelism;

use crate::Result;
use crate::workload::Place;

/// A line for the table's foot, to be written before the run.
pub(crate) fn describe() -> Result<String> {
    let cpu = read_to_string("/proc/cpuinfo")?
        .lines()
        .find_map(|line| line.strip_prefix("model name")?.split_once(": ").map(|(_, model)| model.to_owned()))
        .unwrap_or_else(|| format!("an unnamed {} CPU", std::env::consts::ARCH));
    let kernel = read_to_string("/proc/sys/kernel/osrelease")?;
    let load = read_to_string("/proc/loadavg")?;
    let load = load.split(' ').next().unwrap_or("?");
    let connection = rusqlite::Connection::open_in_memory()?;
    let date: String = connection.query_row("SELECT date('now')", [], |row| row.get(0))?;
    let disk = file_system(Place::Disk.directory()?)?;
    Ok(format!(
        "{cpu}, {cores} cores, Linux {kernel}, disk: {disk}; SQLite {sqlite}, kanbanlock {version}; {date}, \
         load average before the run {load}.",
        cores = available_parallelism()?,
        kernel = kernel.trim_end(),
        sqlite = rusqlite::version(),
        version = env!("CARGO_PKG_VERSION"),
    ))
}

/// The type of the file system that `path` is on: that of the longest mount point above it, and of those
/// the last mounted.
pub(crate) fn file_system(path: &Path) -> Result<String> {
    let path = path.canonicalize()?;
    let mounts = read_to_string("/proc/mounts")?;
    let mut best = (0, "an unknown file system");
    for mount in mounts.lines() {
        let mut fields = mount.split(' ').skip(1);
        if let (Some(point), Some(kind)) = (fields.next(), fields.next())
            && path.starts_with(point)
            && point.len() >= best.0
        {
            best = (point.len(), kind);
        }
    }
    Ok(best.1.to_owned())
}
