//! Options: of a registration, and of one database file.
//!
//! A file's options are the registration's defaults, overridden by the parameters of its URI. Every
//! `kanbanlock_…` parameter must be known and its value valid: a misspelt safety option that is ignored is
//! worse than a database that does not open.
//!
//! Uses: `state`, `gate` and `queue` (the option types live with the code that obeys them).

use std::ffi::CStr;
use std::time::Duration;

use crate::gate::{Fallback, Waiting};
use crate::queue::Micros;
use crate::state::CheckpointPolicy;

/// The options of one database file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FileOptions {
    /// `kanbanlock_checkpoint`
    pub checkpoint: CheckpointPolicy,
    /// `kanbanlock_fallback`
    pub fallback: Fallback,
    /// `kanbanlock_close_proof`; `None`: as the registration says, [`Options::close_proof`].
    pub close_proof: Option<bool>,
    /// `kanbanlock_slice_us`, `kanbanlock_warn_ms`
    pub waiting: Waiting,
}

/// A longer slice would be no queue any more.
const LONGEST_SLICE: Micros = 100_000;

/// What every URI parameter of ours starts with.
pub const PREFIX: &str = "kanbanlock_";
const CHECKPOINT: &CStr = c"kanbanlock_checkpoint";
const FALLBACK: &CStr = c"kanbanlock_fallback";
const CLOSE_PROOF: &CStr = c"kanbanlock_close_proof";
const SLICE_US: &CStr = c"kanbanlock_slice_us";
const WARN_MS: &CStr = c"kanbanlock_warn_ms";
/// All of them.
pub const PARAMETERS: [&CStr; 5] = [CHECKPOINT, FALLBACK, CLOSE_PROOF, SLICE_US, WARN_MS];

impl FileOptions {
    /// These options, overridden by URI parameters. Parameters without our prefix are others' business.
    ///
    /// # Errors
    ///
    /// The text names the unknown parameter or value, and the valid ones.
    pub fn overridden_by(mut self, parameters: &[(String, String)]) -> Result<FileOptions, String> {
        for (key, value) in parameters {
            match key.strip_prefix(PREFIX) {
                None => {}
                Some("checkpoint") => self.checkpoint = parse_checkpoint(value)?,
                Some("fallback") => self.fallback = parse_fallback(value)?,
                Some("close_proof") => self.close_proof = Some(parse_close_proof(value)?),
                Some("slice_us") => self.waiting.slice = parse_slice(value)?,
                Some("warn_ms") => self.waiting.warn_after = parse_warn(value)?,
                Some(_) => {
                    let known = PARAMETERS.map(CStr::to_string_lossy).join(", ");
                    return Err(format!("unknown URI parameter {key:?}; the known ones are {known}"));
                }
            }
        }
        Ok(self)
    }
}

fn parse_checkpoint(value: &str) -> Result<CheckpointPolicy, String> {
    match value {
        "auto" => Ok(CheckpointPolicy::Auto),
        "free" => Ok(CheckpointPolicy::Free),
        "gate" => Ok(CheckpointPolicy::Gate),
        _ => Err(invalid(CHECKPOINT, value, "auto, free, gate")),
    }
}

fn parse_fallback(value: &str) -> Result<Fallback, String> {
    match value {
        "refuse" => Ok(Fallback::Refuse),
        "unlocked" => Ok(Fallback::Unlocked),
        _ => Err(invalid(FALLBACK, value, "refuse, unlocked")),
    }
}

fn parse_close_proof(value: &str) -> Result<bool, String> {
    match value {
        "on" => Ok(true),
        "off" => Ok(false),
        _ => Err(invalid(CLOSE_PROOF, value, "on, off")),
    }
}

fn parse_slice(value: &str) -> Result<Micros, String> {
    match value.parse() {
        Ok(slice) if slice <= LONGEST_SLICE => Ok(slice),
        _ => Err(invalid(SLICE_US, value, &format!("0 to {LONGEST_SLICE} (microseconds)"))),
    }
}

fn parse_warn(value: &str) -> Result<Micros, String> {
    let milliseconds: Result<u32, _> = value.parse();
    match milliseconds {
        Ok(milliseconds) => Ok(Micros::from(milliseconds) * 1000),
        Err(_) => Err(invalid(WARN_MS, value, "0 (never) to 4294967295 (milliseconds)")),
    }
}

fn invalid(key: &CStr, value: &str, valid: &str) -> String {
    format!("invalid value {value:?} of URI parameter {}; the valid ones are {valid}", key.to_string_lossy())
}

impl CheckpointPolicy {
    /// As in the URI.
    pub fn as_str(self) -> &'static str {
        match self {
            CheckpointPolicy::Auto => "auto",
            CheckpointPolicy::Free => "free",
            CheckpointPolicy::Gate => "gate",
        }
    }
}

impl Fallback {
    /// As in the URI.
    pub fn as_str(self) -> &'static str {
        match self {
            Fallback::Refuse => "refuse",
            Fallback::Unlocked => "unlocked",
        }
    }
}

/// How to register the VFS; see [`Options::register`](crate::Options::register).
///
/// ```
/// # use rusqlite as _; // links SQLite
/// use kanbanlock::{CheckpointPolicy, Options};
///
/// Options::new()
///     .name("kanbanlock-gated")
///     .real_vfs("unix")
///     .checkpoint(CheckpointPolicy::Gate)
///     .register()?;
/// # Ok::<(), kanbanlock::RegisterError>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    pub(crate) name: String,
    pub(crate) real_vfs: Option<String>,
    pub(crate) make_default: bool,
    pub(crate) close_proof: bool,
    pub(crate) file: FileOptions,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            name: crate::VFS_NAME.to_owned(),
            real_vfs: None,
            make_default: false,
            close_proof: true,
            file: FileOptions::default(),
        }
    }
}

impl Options {
    /// The VFS `kanbanlock`, wrapping SQLite's default VFS, not made the default.
    pub fn new() -> Options {
        Options::default()
    }

    /// The name to register, for `?vfs=NAME`. Default: [`VFS_NAME`](crate::VFS_NAME).
    #[must_use]
    pub fn name(mut self, name: impl Into<String>) -> Options {
        self.name = name.into();
        self
    }

    /// The VFS to wrap, by name. Default: the default VFS at the time of registration.
    #[must_use]
    pub fn real_vfs(mut self, name: impl Into<String>) -> Options {
        self.real_vfs = Some(name.into());
        self
    }

    /// Makes it the default VFS: connections opened by plain path go through kanbanlock too.
    ///
    /// A VFS that is registered already becomes the default when it is registered again with this; registering it again
    /// without does not take that back.
    #[must_use]
    pub fn make_default(mut self, make_default: bool) -> Options {
        self.make_default = make_default;
        self
    }

    /// True if `other` describes the same VFS. Whether that is the default one is not a property of the VFS.
    pub(crate) fn is_same_vfs(&self, other: &Options) -> bool {
        let other = Options { make_default: self.make_default, ..other.clone() };
        *self == other
    }

    /// Close-proof locks (default: true): the unix VFS's locks no longer vanish when some code in this process opens and
    /// closes the database or its `-shm`. They are installed once for the whole copy of SQLite, for good, and protect its
    /// plain `unix` connections too. Without support (another real VFS, no `/proc`) they stay off, with a line in the log.
    ///
    /// The default for connections whose URI has no `kanbanlock_close_proof=on|off`; `on` installs them if need be, and
    /// does not open the database where there is no support. What shows at the first lock only (the file cannot be opened
    /// again, no descriptor is left, the file system has no such locks) leaves that file on POSIX locks even so, with a
    /// line in the log. All connections of one copy of SQLite to one file go one
    /// way: one that wishes for the other way while it is open is not opened, and the log says so. `PRAGMA kanbanlock`
    /// says which way a file goes.
    #[must_use]
    pub fn close_proof(mut self, close_proof: bool) -> Options {
        self.close_proof = close_proof;
        self
    }

    /// When a checkpoint takes the gate, where the URI does not say.
    #[must_use]
    pub fn checkpoint(mut self, policy: CheckpointPolicy) -> Options {
        self.file.checkpoint = policy;
        self
    }

    /// How long a connection that writes in a tight loop may go on while others wait, where the URI does not say; at most
    /// 100 ms. Default: 1 ms. A longer slice is more throughput, and as much longer a wait for each of the others.
    #[must_use]
    pub fn slice(mut self, slice: Duration) -> Options {
        self.file.waiting.slice =
            Micros::try_from(slice.as_micros()).unwrap_or(Micros::MAX).min(LONGEST_SLICE);
        self
    }

    /// How long a connection waits for the flock before a line in the log says who holds it, where the URI does not say;
    /// zero: it does not. Default: 2 s.
    #[must_use]
    pub fn warn_after(mut self, wait: Duration) -> Options {
        self.file.waiting.warn_after = Micros::try_from(wait.as_micros()).unwrap_or(Micros::MAX);
        self
    }

    /// What to do without a usable lock file, where the URI does not say.
    #[must_use]
    pub fn fallback(mut self, fallback: Fallback) -> Options {
        self.file.fallback = fallback;
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(parameters: &[(&str, &str)]) -> Result<FileOptions, String> {
        let owned: Vec<_> = parameters.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
        FileOptions::default().overridden_by(&owned)
    }

    #[test]
    fn known_parameters_override_and_strangers_pass() {
        assert_eq!(
            parse(&[("mode", "rw"), ("vfs", "kanbanlock"), ("kanban", "x")]),
            Ok(FileOptions::default())
        );
        assert_eq!(
            parse(&[
                ("kanbanlock_checkpoint", "gate"),
                ("kanbanlock_fallback", "unlocked"),
                ("kanbanlock_close_proof", "off"),
                ("kanbanlock_slice_us", "0"),
                ("kanbanlock_warn_ms", "3"),
            ]),
            Ok(FileOptions {
                checkpoint: CheckpointPolicy::Gate,
                fallback: Fallback::Unlocked,
                close_proof: Some(false),
                waiting: Waiting { slice: 0, warn_after: 3000 },
            })
        );
    }

    #[test]
    fn each_valid_value_round_trips() {
        for policy in [CheckpointPolicy::Auto, CheckpointPolicy::Free, CheckpointPolicy::Gate] {
            assert_eq!(parse_checkpoint(policy.as_str()), Ok(policy));
        }
        for fallback in [Fallback::Refuse, Fallback::Unlocked] {
            assert_eq!(parse_fallback(fallback.as_str()), Ok(fallback));
        }
        assert_eq!((parse_close_proof("on"), parse_close_proof("off")), (Ok(true), Ok(false)));
    }

    #[test]
    fn errors_name_the_culprit_and_the_valid_ones() {
        let error = parse(&[("kanbanlock_chekpoint", "gate")]).unwrap_err();
        assert!(
            error.contains("kanbanlock_chekpoint") && error.contains("kanbanlock_checkpoint,"),
            "{error}"
        );
        let error = parse(&[("kanbanlock_checkpoint", "sometimes")]).unwrap_err();
        assert!(error.contains("sometimes") && error.contains("auto, free, gate"), "{error}");
        for wrong in ["", "-1", "100001", "1ms"] {
            let error = parse(&[("kanbanlock_slice_us", wrong)]).unwrap_err();
            assert!(error.contains("0 to 100000 (microseconds)"), "{error}");
        }
        for wrong in ["", "-1", "1.5"] {
            assert!(parse(&[("kanbanlock_warn_ms", wrong)]).is_err(), "{wrong}");
        }
        let error = parse(&[("kanbanlock_fallback", "")]).unwrap_err();
        assert!(error.contains("refuse, unlocked"), "{error}");
        let error = parse(&[("kanbanlock_close_proof", "yes")]).unwrap_err();
        assert!(error.contains("yes") && error.contains("on, off"), "{error}");
    }
}
