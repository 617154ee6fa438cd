//! What a figure means nothing without: the machine, its file systems, the versions, the day.

use std::fmt;
use std::fs::read_to_string;
use std::path::Path;
use std::thread::available_parallelism;

use serde::Serialize;

use crate::Result;

/// The machine before a run.
#[derive(Serialize)]
pub(crate) struct Machine {
    cpu: String,
    cores: usize,
    kernel: String,
    /// The type of the disk's file system.
    disk: String,
    sqlite: &'static str,
    kanbanlock: &'static str,
    date: String,
    load_average: String,
}

impl Machine {
    /// This one, now. `disk` is the directory that stands for the disk.
    pub(crate) fn look(disk: &Path) -> Result<Self> {
        let cpu = read_to_string("/proc/cpuinfo")?
            .lines()
            .find_map(|line| {
                line.strip_prefix("model name")?.split_once(": ").map(|(_, model)| model.to_owned())
            })
            .unwrap_or_else(|| format!("an unnamed {} CPU", std::env::consts::ARCH));
        let load = read_to_string("/proc/loadavg")?;
        let connection = rusqlite::Connection::open_in_memory()?;
        Ok(Self {
            cpu,
            cores: available_parallelism()?.get(),
            kernel: read_to_string("/proc/sys/kernel/osrelease")?.trim_end().to_owned(),
            disk: file_system(disk)?,
            sqlite: rusqlite::version(),
            kanbanlock: env!("CARGO_PKG_VERSION"),
            date: connection.query_row("SELECT date('now')", [], |row| row.get(0))?,
            load_average: load.split(' ').next().unwrap_or("?").to_owned(),
        })
    }
}

/// A line for a table's foot.
impl fmt::Display for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { cpu, cores, kernel, disk, sqlite, kanbanlock, date, load_average } = self;
        write!(
            f,
            "{cpu}, {cores} cores, Linux {kernel}, disk: {disk}; SQLite {sqlite}, kanbanlock {kanbanlock}; \
             {date}, load average before the run {load_average}."
        )
    }
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
