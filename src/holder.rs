//! Who holds the flock on a lock file, as the kernel tells it: `/proc/locks`, for messages and for those who look on.
//!
//! ## Definitions
//! A line of `/proc/locks` names a file by device and inode (proc(5)): `1: FLOCK  ADVISORY  WRITE 4711 fe:00:131 0 EOF`. The
//! device is that of the *mounted file system*. stat(2) mostly says the same, but on btrfs it has a device of its own for
//! each subvolume. What is mounted where is in `/proc/self/mountinfo`.
//!
//! ## Invariants
//! - A holder is named for a file that stat(2) knows under the same device; or else, if the mount's device is another, for a
//!   process that has this very file open, by device and inode of stat(2): an inode number comes again in each subvolume of
//!   a btrfs. If its descriptors cannot be seen (another user's), the line is believed.
//! - Who holds the lock all the time is found, however many other locks come and go ([`find_in_locks`]).
//! - [`read_flock_holder`] locks nothing, and opens no file but with O_PATH.
//!
//! Uses: `sys`.

use std::ffi::CStr;
use std::fs::File;
use std::io::{self, Read as _};
use std::os::fd::BorrowedFd;
use std::os::unix::fs::MetadataExt;

use crate::sys::{self, FileId};

/// Who holds a flock on the lock file at `path`, which is `id`: a pid of this pid namespace.
///
/// # Errors
///
/// `/proc/locks` cannot be read.
pub fn read_flock_holder(path: &CStr, id: FileId) -> io::Result<Option<u32>> {
    let its_name = name(id.device(), id.numbers().1);
    if let Some(pid) = find_in_locks(|locks| flock_holders(locks, &its_name).next())? {
        return Ok(Some(pid));
    }
    let Some(device) = device_of_mount(path).filter(|device| *device != id.device()) else { return Ok(None) };
    find_holder_of(&name(device, id.numbers().1), id)
}

/// Who holds a flock on the lock file `id` that `fd` is open on. The kernel is asked what it is called in `/proc/locks`,
/// so this finds the holder on any file system. What cannot be read is nobody.
pub fn flock_holder(fd: BorrowedFd<'_>, id: FileId) -> Option<u32> {
    let its_name = name(id.device(), id.numbers().1);
    if let Some(pid) = find_in_locks(|locks| flock_holders(locks, &its_name).next()).ok()? {
        return Some(pid);
    }
    let other = sys::name_in_proc_locks(fd).filter(|other| *other != its_name)?;
    find_holder_of(&other, id).ok()?
}

/// By a name that files of several subvolumes may have.
fn find_holder_of(name: &str, id: FileId) -> io::Result<Option<u32>> {
    find_in_locks(|locks| flock_holders(locks, name).find(|pid| has_open(*pid, id).unwrap_or(true)))
}

/// Looks into `/proc/locks`, and again if what is wanted may have been skipped.
///
/// The kernel shows as many lines as fit into a page as they are at one moment (`locks_start` to `locks_stop` in fs/locks.c,
/// `seq_read_iter` in fs/seq_file.c). The next read(2) goes on by the *number* of lines it has shown: if one of those is
/// gone by then, a lock that is held all the time is shown in neither. So the buffer is not smaller than a page:
/// `std::fs::read_to_string` begins with 32 bytes, and misses locks on a busy machine.
fn find_in_locks(find: impl Fn(&str) -> Option<u32>) -> io::Result<Option<u32>> {
    const ATTEMPTS: usize = 8;
    let mut page = vec![0; 1 << 16];
    for _ in 0..ATTEMPTS {
        let mut file = File::open("/proc/locks")?;
        let mut locks = Vec::new();
        let mut pages = 0;
        loop {
            match file.read(&mut page) {
                Ok(0) => break,
                Ok(length) => locks.extend_from_slice(&page[..length]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            }
            pages += 1;
        }
        let found = find(&String::from_utf8_lossy(&locks));
        if found.is_some() || pages <= 1 {
            return Ok(found);
        }
    }
    Ok(None)
}

/// As `/proc/locks` has a file: `MAJOR:MINOR:INODE`, the device in hexadecimal. proc(5)
fn name(device: (u32, u32), inode: u64) -> String {
    format!("{:02x}:{:02x}:{inode}", device.0, device.1)
}

/// The processes in `/proc/locks` that hold a flock on the file of this name.
fn flock_holders(locks: &str, wanted: &str) -> impl Iterator<Item = u32> {
    locks.lines().filter_map(move |line| {
        let mut fields = line.split_ascii_whitespace().skip(1);
        let is_flock = fields.next() == Some("FLOCK");
        let pid = fields.nth(2)?.parse().ok()?;
        let file = fields.next()?;
        (is_flock && file == wanted).then_some(pid)
    })
}

/// The device of the file system that `path` is on, as the kernel has it mounted. `None`: not in this mount namespace.
fn device_of_mount(path: &CStr) -> Option<(u32, u32)> {
    let mount = sys::mount_of(path).ok()??;
    parse_device_of_mount(&std::fs::read_to_string("/proc/self/mountinfo").ok()?, mount)
}

/// A line of `/proc/self/mountinfo`: `44 27 0:39 / /home rw,relatime - btrfs /dev/sda2 rw`, the device in decimal.
fn parse_device_of_mount(mounts: &str, mount: u64) -> Option<(u32, u32)> {
    mounts.lines().find_map(|line| {
        let mut fields = line.split(' ');
        let is_it = fields.next()?.parse() == Ok(mount);
        let (major, minor) = fields.nth(1)?.split_once(':')?;
        if is_it { Some((major.parse().ok()?, minor.parse().ok()?)) } else { None }
    })
}

/// True if the process has that file open; an error if its descriptors cannot be seen.
fn has_open(pid: u32, id: FileId) -> io::Result<bool> {
    for entry in std::fs::read_dir(format!("/proc/{pid}/fd"))? {
        // Followed to the file itself; a descriptor may be closed meanwhile.
        let Ok(file) = entry?.path().metadata() else { continue };
        if FileId::new(file.dev(), file.ino()) == id {
            return Ok(true);
        }
    }
    Ok(false)
}

/// What a process was started with, for a message: `/proc/PID/cmdline`. proc(5)
pub fn command_line(pid: u32) -> String {
    let arguments = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let line = String::from_utf8_lossy(&arguments).replace('\0', " ");
    match line.trim().char_indices().nth(100) {
        Some((end, _)) => format!("{}…", &line[..end]),
        None if line.trim().is_empty() => "its command line cannot be read".to_owned(),
        None => line.trim().to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use std::ffi::CString;
    use std::os::fd::AsFd;
    use std::os::unix::ffi::OsStrExt;
    use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

    use tempfile::NamedTempFile;

    use super::*;

    #[test]
    fn the_holder_is_the_flock_on_exactly_this_file() {
        let locks = "1: POSIX  ADVISORY  WRITE 11 fe:00:131 0 EOF\n\
                     2: FLOCK  ADVISORY  WRITE 12 fe:00:132 0 EOF\n\
                     2: -> FLOCK  ADVISORY  WRITE 14 fe:00:131 0 EOF\n\
                     3: FLOCK  ADVISORY  WRITE 13 fe:00:131 0 EOF\n";
        let holder = |text: &str| flock_holders(text, &name((0xfe, 0), 131)).next();
        assert_eq!(holder(locks), Some(13));
        assert_eq!(holder(""), None);
        assert_eq!(holder("nonsense\n1: FLOCK\n"), None);
    }

    /// As Linux 6.18 has it for a btrfs whose files stat(2) puts on devices 0:40 and 0:41.
    #[test]
    fn the_device_of_a_mount_is_read_by_its_number() {
        let mounts = "27 1 254:0 / / rw,relatime - ext4 /dev/root rw\n\
                      44 27 0:39 / /tmp/m rw,relatime shared:7 - btrfs /dev/loop0 rw,subvol=/\n";
        assert_eq!(parse_device_of_mount(mounts, 44), Some((0, 39)));
        assert_eq!(parse_device_of_mount(mounts, 27), Some((254, 0)));
        assert_eq!(parse_device_of_mount(mounts, 4), None);
        assert_eq!(parse_device_of_mount("nonsense\n", 4), None);
        let locks = "4: FLOCK  ADVISORY  WRITE 30386 00:27:257 0 EOF\n";
        assert_eq!(flock_holders(locks, &name((0, 39), 257)).next(), Some(30386));
    }

    /// Far more locks than a page has room for, and those at the front come and go.
    #[test]
    fn who_holds_it_all_the_time_is_found_while_other_locks_come_and_go() {
        let file = || NamedTempFile::new().unwrap();
        let held: Vec<_> = (0..200).map(|_| file()).collect();
        for file in &held {
            file.as_file().lock().unwrap();
        }
        let is_over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let others: Vec<_> = (0..20).map(|_| file()).collect();
                while !is_over.load(Relaxed) {
                    others.iter().for_each(|other| other.as_file().lock().unwrap());
                    others.iter().for_each(|other| other.as_file().unlock().unwrap());
                }
            });
            let is_missed = |file: &NamedTempFile| {
                let attributes = sys::fstat(file.as_file().as_fd()).unwrap();
                let path = CString::new(file.path().as_os_str().as_bytes()).unwrap();
                read_flock_holder(&path, attributes.id).ok().flatten() != Some(std::process::id())
            };
            let missed = held.iter().cycle().take(4_000).filter(|file| is_missed(file)).count();
            is_over.store(true, Relaxed);
            assert_eq!(missed, 0, "of 4000");
        });
    }

    /// On whatever file system the temporary folder is. `tests/btrfs.rs` has btrfs, where stat(2) does not help.
    #[test]
    fn the_kernel_says_what_a_file_is_called_in_proc_locks() {
        let file = NamedTempFile::new().unwrap();
        file.as_file().lock().unwrap();
        let other = file.reopen().unwrap();
        let name = sys::name_in_proc_locks(other.as_fd()).unwrap();
        let locks = std::fs::read_to_string("/proc/locks").unwrap();
        assert_eq!(flock_holders(&locks, &name).next(), Some(std::process::id()));
        assert!(!sys::locks_of(other.as_fd()).unwrap().contains("OFDLCK"), "and leaves no lock behind");
    }
}
