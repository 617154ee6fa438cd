//! Which SQLite is in a process: found in the files that it has mapped to execute.
//!
//! A copy of SQLite is known by its source id (`SQLITE_SOURCE_ID`, "2026-03-06 16:01:44 557ae…"), which is in every build,
//! also in one that is linked statically and stripped. The version is that of the symbol `sqlite3_version`, if the file still
//! has it.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use object::{Object, ObjectSection, ObjectSymbol};
use regex::bytes::Regex;

use super::{Finding, is_wal, named, ok, unknown, wrong};
use crate::database::Database;
use crate::processes::{Scan, Through};

/// A copy of SQLite in a file.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Copy {
    /// The date of the source id.
    date: String,
    version: Option<Version>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Version(u32, u32, u32);

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.0, self.1, self.2)
    }
}

impl fmt::Display for Copy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.version {
            Some(version) => write!(f, "SQLite {version}"),
            None => write!(f, "SQLite of {} (its version cannot be seen)", self.date),
        }
    }
}

impl Version {
    /// The WAL-reset race: 3.7.0 to 3.51.2 have it, but for 3.44.6 and 3.50.7. <https://www.sqlite.org/wal.html>
    fn has_wal_reset_race(self) -> bool {
        let has_wal = self >= Version(3, 7, 0);
        has_wal && self < Version(3, 51, 3) && ![Version(3, 44, 6), Version(3, 50, 7)].contains(&self)
    }
}

/// The day of 3.51.3: a source id from before, of unknown version, is taken to have the race.
const FIXED_SINCE: &str = "2026-03-13";

impl Copy {
    fn has_wal_reset_race(&self) -> bool {
        match self.version {
            Some(version) => version.has_wal_reset_race(),
            None => &*self.date < FIXED_SINCE,
        }
    }
}

/// What is in a file. `None`: no SQLite.
fn find(bytes: &[u8], source_id: &Regex) -> Option<Copy> {
    let id = source_id.find(bytes)?;
    let date = String::from_utf8_lossy(&id.as_bytes()[..10]).into_owned();
    Some(Copy { date, version: version(bytes) })
}

fn version(bytes: &[u8]) -> Option<Version> {
    let file = object::File::parse(bytes).ok()?;
    let mut symbols = file.dynamic_symbols().chain(file.symbols());
    let address = symbols.find(|symbol| symbol.name() == Ok("sqlite3_version"))?.address();
    // Sections that are not loaded have the address 0.
    let text = file.sections().filter(|section| section.address() != 0).find_map(|section| {
        let start = usize::try_from(address.checked_sub(section.address())?).ok()?;
        let data = section.uncompressed_data().ok()?;
        data.get(start..)?.get(..16).map(<[u8]>::to_vec)
    })?;
    let text = text.split(|byte| *byte == 0).next()?;
    let mut numbers = std::str::from_utf8(text).ok()?.split('.').map(str::parse);
    let mut next = || numbers.next()?.ok();
    Some(Version(next()?, next()?, next()?))
}

pub fn check(scan: &Scan, file: &Database) -> Vec<Finding> {
    const CHECK: &str = "SQLite";
    let mut findings = Vec::new();
    let Ok(source_id) = Regex::new(r"(?-u)20\d\d-\d\d-\d\d \d\d:\d\d:\d\d [0-9a-f]{40}") else {
        return findings;
    };
    let mut files: BTreeMap<PathBuf, Option<Copy>> = BTreeMap::new();
    for process in scan.processes.iter().filter(|process| process.uses_db()) {
        let mut copies = Vec::new();
        for path in &process.code {
            // As the process sees it: it may be in a container.
            let inside = Path::new("/proc").join(process.pid.to_string()).join("root");
            let inside = inside.join(path.strip_prefix("/").unwrap_or(path));
            let read = || fs::read(inside).ok().and_then(|bytes| find(&bytes, &source_id));
            if let Some(copy) = files.entry(path.clone()).or_insert_with(read) {
                copies.push((path, copy.clone()));
            }
        }
        let who = named(process);
        if copies.is_empty() {
            let what = format!("{who}: its SQLite was not found in the files that it has mapped");
            findings.push(unknown(
                CHECK,
                what,
                "run it as root; a program that was deleted since cannot be read",
            ));
        }
        if copies.len() > 1 {
            let list: Vec<String> =
                copies.iter().map(|(path, copy)| format!("{copy} in {}", path.display())).collect();
            let what = format!("{who} has {} copies of SQLite: {}", copies.len(), list.join(", "));
            let fix = "POSIX locks do not exclude within a process: open the database through one copy only, or \
                       through kanbanlock in both";
            findings.push(wrong(CHECK, what, fix));
        }
        for (path, copy) in copies {
            let what = format!("{who}: {copy} in {}", path.display());
            if !copy.has_wal_reset_race() {
                findings.push(ok(CHECK, what));
            } else if !is_wal(file) {
                findings.push(ok(
                    CHECK,
                    format!("{what}: it has the WAL-reset race, but this database is not in WAL mode"),
                ));
            } else if process.through().0 == Through::Yes {
                let what = format!(
                    "{what}: it has the WAL-reset race, which kanbanlock's reset guard closes for its writes"
                );
                findings.push(ok(CHECK, what));
            } else {
                let fix = "update it to 3.51.3 or later, or open the database through kanbanlock";
                findings.push(wrong(
                    CHECK,
                    format!("{what} has the WAL-reset race, which loses commits"),
                    fix,
                ));
            }
        }
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_race_is_in_exactly_these_versions() {
        for old in
            [Version(3, 7, 0), Version(3, 40, 1), Version(3, 44, 5), Version(3, 50, 6), Version(3, 51, 2)]
        {
            assert!(old.has_wal_reset_race(), "{old}");
        }
        for good in
            [Version(3, 6, 23), Version(3, 44, 6), Version(3, 50, 7), Version(3, 51, 3), Version(3, 54, 1)]
        {
            assert!(!good.has_wal_reset_race(), "{good}");
        }
    }
}
