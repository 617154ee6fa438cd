//! `kanbanlock backup`: a copy of a database in use, through SQLite's backup API, verified, renamed into place.
//!
//! ## How
//! The source's pages are copied within *one read transaction*. So the copy is one committed state, whatever is written
//! meanwhile, and the backup does not start again: sqlite3_backup_step() begins and ends a transaction of its own only if
//! "there is no open read-transaction on the source database" (backup.c), and it is a new transaction that finds the source
//! changed and starts again; under writers that do not pause, each time. In WAL mode writers go on, and the WAL cannot start
//! over until the copy is made; in rollback mode they wait at their COMMIT, and then keep new readers out. `--hold`
//! takes the gate first: writers wait at their BEGIN IMMEDIATE, where they are in nobody's way, and the WAL does not grow.
//!
//! The copy is made in a file of its own beside OUT, so that OUT is either what it was or the whole, verified copy: it is
//! checked, fsync(2)ed and renamed.
//!
//! ## WAL
//! What is in `DB-wal` is in the copy, which is one file. Its journal mode is the source's.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::ErrorKind;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use kanbanlock::Hold;
use rusqlite::backup::{Backup, StepResult};
use rusqlite::{Connection, ErrorCode, OpenFlags};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use tempfile::NamedTempFile;

use crate::failure::{self, Failure};

/// 128 + SIGINT: interrupted.
const INTERRUPTED: u8 = 130;

/// Copies a database while it is in use, verifies the copy, and renames it into place.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  kanbanlock backup kanban.db copy.db
  kanbanlock backup --force --hold kanban.db copy.db

The copy is one committed state of the database, the content of DB-wal included. Killed midway, it leaves OUT as it was, and
a file OUT.….partial behind.")]
pub struct Args {
    /// The database.
    #[arg(value_name = "DB")]
    database: PathBuf,

    /// The copy; its folder must exist.
    #[arg(value_name = "OUT")]
    out: PathBuf,

    /// Replace OUT if it exists.
    #[arg(short, long)]
    force: bool,

    /// Keep writers waiting while the pages are copied, at the beginning of their transactions.
    #[arg(long)]
    hold: bool,

    /// How long to wait for the database
    #[arg(short = 'w', long, value_name = "SECS", default_value_t = 60)]
    timeout: u32,

    /// Pages in a step
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = clap::value_parser!(i32).range(1..))]
    pages: i32,

    /// Pause between two steps, to be gentle to the disk
    #[arg(long, value_name = "MS", default_value_t = 0)]
    pause: u32,
}

/// What the copy is compared by with the source, in one and the same read transaction.
#[derive(Debug, PartialEq, Eq)]
struct Facts {
    page_count: i64,
    page_size: i64,
    user_version: i64,
    application_id: i64,
}

/// `kanbanlock backup`
pub fn run(args: Args) -> Result<ExitCode, Failure> {
    let metadata = fs::metadata(&args.database).map_err(|error| Failure::of_file(&args.database, &error))?;
    let (folder, name) = check_out(&args, &metadata)?;
    let interrupted =
        catch_signals().map_err(|error| Failure::of_system("signals cannot be caught", &error))?;

    let source = open_source(&args)?;
    let hold = if args.hold { Some(hold(&args)?) } else { None };
    let mut prefix = OsString::from(".");
    prefix.push(name);
    prefix.push(".");
    let partial =
        tempfile::Builder::new().prefix(&prefix).suffix(".partial").tempfile_in(folder).map_err(|error| {
            Failure::new(failure::CANNOT_CREATE, format!("{}: {error}", folder.display()))
        })?;

    let facts = copy(&args, &source, partial.path(), &interrupted)?;
    drop(hold);
    let journal_mode: String =
        source.query_row("PRAGMA journal_mode", [], |row| row.get(0)).map_err(of_database(&args))?;
    verify(partial.path(), &facts)?;
    check_interrupted(&interrupted)?;
    put_in_place(&args, partial, folder, &metadata)?;

    let Facts { page_count, page_size, user_version, .. } = facts;
    println!(
        "{}: {page_count} pages of {page_size} bytes, integrity_check ok, user_version {user_version}, journal mode \
         {journal_mode}{}",
        args.out.display(),
        if journal_mode == "wal" { "; what was in the source's -wal is in it" } else { "" }
    );
    Ok(ExitCode::SUCCESS)
}

/// The folder and the name of OUT, if it may be made there.
fn check_out<'a>(
    args: &'a Args,
    database: &fs::Metadata,
) -> Result<(&'a Path, &'a std::ffi::OsStr), Failure> {
    let out = &args.out;
    let refuse = |why: &str| Failure::new(failure::CANNOT_CREATE, format!("{}: {why}", out.display()));
    let name = out.file_name().ok_or_else(|| refuse("not the name of a file"))?;
    let folder = out.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    if !folder.is_dir() {
        return Err(refuse("its folder does not exist; make it first"));
    }
    if let Ok(there) = fs::metadata(out) {
        if (there.dev(), there.ino()) == (database.dev(), database.ino()) {
            return Err(refuse("is the database itself; choose another OUT"));
        }
    }
    match fs::symlink_metadata(out) {
        Ok(there) if !there.is_file() => {
            return Err(refuse("exists, and is not a regular file; choose another OUT"));
        }
        Ok(_) if !args.force => return Err(refuse("exists; --force replaces it")),
        _ => {}
    }
    // SQLite would take them for the copy's own, and roll back a hot journal into it.
    for suffix in ["-wal", "-journal"] {
        let mut beside = out.clone().into_os_string();
        beside.push(suffix);
        let beside = PathBuf::from(beside);
        if fs::symlink_metadata(&beside).is_ok() {
            return Err(refuse(&format!(
                "{} exists: OUT is in use, or was when its process died. Close it (sqlite3 OUT 'PRAGMA \
                 wal_checkpoint(TRUNCATE)'), or choose another OUT",
                beside.display()
            )));
        }
    }
    Ok((folder, name))
}

/// The first signal ends the backup tidily, the second at once.
fn catch_signals() -> std::io::Result<Arc<AtomicBool>> {
    let interrupted = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM, SIGHUP] {
        signal_hook::flag::register_conditional_shutdown(signal, INTERRUPTED.into(), interrupted.clone())?;
        signal_hook::flag::register(signal, interrupted.clone())?;
    }
    Ok(interrupted)
}

fn check_interrupted(interrupted: &AtomicBool) -> Result<(), Failure> {
    if interrupted.load(Ordering::Relaxed) {
        return Err(Failure::new(INTERRUPTED, "interrupted; there is no copy"));
    }
    Ok(())
}

/// Opened through kanbanlock, and read once: so what a crash has left is recovered before the gate is held.
fn open_source(args: &Args) -> Result<Connection, Failure> {
    kanbanlock::register().map_err(|error| Failure::new(failure::OS, error.to_string()))?;
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let source = Connection::open_with_flags_and_vfs(&args.database, flags, kanbanlock::VFS_NAME)
        .map_err(of_database(args))?;
    source.busy_timeout(Duration::from_secs(args.timeout.into())).map_err(of_database(args))?;
    read(&source).map_err(of_database(args))?;
    Ok(source)
}

fn read(source: &Connection) -> rusqlite::Result<i64> {
    source.query_row("SELECT count(*) FROM sqlite_schema", [], |row| row.get(0))
}

/// Copies the pages to `partial`, an empty file; answers what the source is.
fn copy(
    args: &Args,
    source: &Connection,
    partial: &Path,
    interrupted: &AtomicBool,
) -> Result<Facts, Failure> {
    let of_source = of_database(args);
    let of_copy =
        |error: rusqlite::Error| Failure::new(failure::IO, format!("{}: {error}", partial.display()));
    let mut copy = Connection::open_with_flags_and_vfs(partial, OpenFlags::SQLITE_OPEN_READ_WRITE, "unix")
        .map_err(of_copy)?;
    // Nobody else knows this file, it is thrown away if anything fails, and synced as a whole at the end.
    copy.execute_batch(
        "PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; PRAGMA locking_mode = EXCLUSIVE",
    )
    .map_err(of_copy)?;

    source.execute_batch("BEGIN").map_err(&of_source)?;
    read(source).map_err(&of_source)?;
    let facts = Facts::of(source).map_err(&of_source)?;
    let bar = progress_bar(&facts);
    let backup = Backup::new(source, &mut copy).map_err(&of_source)?;
    loop {
        check_interrupted(interrupted)?;
        let step = backup.step(args.pages).map_err(&of_source)?;
        let progress = backup.progress();
        bar.set_position(u64::try_from(progress.pagecount - progress.remaining).unwrap_or(0));
        match step {
            StepResult::Done => break,
            StepResult::More => thread::sleep(Duration::from_millis(args.pause.into())),
            // Within a read transaction of the source, and with the copy to ourselves, neither is to be expected.
            _ => return Err(Failure::new(failure::NO, format!("{}: locked", args.database.display()))),
        }
    }
    drop(backup);
    bar.finish_and_clear();
    source.execute_batch("COMMIT").map_err(&of_source)?;
    copy.close().map_err(|(_, error)| of_copy(error))?;
    Ok(facts)
}

fn hold(args: &Args) -> Result<Hold, Failure> {
    let begin = Instant::now();
    let patience = Duration::from_secs(args.timeout.into());
    let hold = Hold::acquire(&args.database, Some(patience))
        .map_err(|error| Failure::new(failure::CANNOT_CREATE, error.to_string()))?;
    hold.ok_or_else(|| {
        let (database, seconds) = (args.database.display(), begin.elapsed().as_secs());
        let message = format!(
            "{database}: somebody else writes, since {seconds} s; `kanbanlock status {database}` says who"
        );
        Failure::new(failure::NO, message)
    })
}

/// On a connection of its own, which reads the file and nothing beside it.
fn verify(partial: &Path, expected: &Facts) -> Result<(), Failure> {
    let bad = |what: String| {
        Failure::new(failure::IO, format!("the copy is not good, and was thrown away: {what}"))
    };
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_URI;
    let copy = Connection::open_with_flags_and_vfs(immutable_uri(partial), flags, "unix")
        .map_err(|error| bad(error.to_string()))?;
    let facts = Facts::of(&copy).map_err(|error| bad(error.to_string()))?;
    if facts != *expected {
        return Err(bad(format!("the source is {expected:?}, the copy {facts:?}")));
    }
    let found: String = copy
        .query_row("SELECT group_concat(integrity_check, '; ') FROM pragma_integrity_check", [], |row| {
            row.get(0)
        })
        .map_err(|error| bad(error.to_string()))?;
    if found == "ok" { Ok(()) } else { Err(bad(format!("integrity_check says {found}"))) }
}

fn put_in_place(
    args: &Args,
    partial: NamedTempFile,
    folder: &Path,
    database: &fs::Metadata,
) -> Result<(), Failure> {
    let failed = |error: std::io::Error| match error.kind() {
        ErrorKind::AlreadyExists => Failure::new(
            failure::CANNOT_CREATE,
            format!("{}: exists by now; --force replaces it", args.out.display()),
        ),
        _ => Failure::new(failure::CANNOT_CREATE, format!("{}: {error}", args.out.display())),
    };
    fs::set_permissions(partial.path(), database.permissions()).map_err(failed)?;
    partial.as_file().sync_all().map_err(failed)?;
    let done = if args.force { partial.persist(&args.out) } else { partial.persist_noclobber(&args.out) };
    done.map_err(|error| failed(error.error))?;
    File::open(folder).and_then(|folder| folder.sync_all()).map_err(failed)
}

impl Facts {
    fn of(db: &Connection) -> rusqlite::Result<Facts> {
        let pragma = |name| db.query_row(&format!("PRAGMA {name}"), [], |row| row.get(0));
        Ok(Facts {
            page_count: pragma("page_count")?,
            page_size: pragma("page_size")?,
            user_version: pragma("user_version")?,
            application_id: pragma("application_id")?,
        })
    }
}

/// "immutable … the database file cannot be changed … and so the database is opened without locking or change detection"
/// (<https://www.sqlite.org/uri.html>): no `-wal`, no `-shm`.
fn immutable_uri(path: &Path) -> String {
    let mut uri = String::from("file:");
    for byte in path.as_os_str().as_bytes() {
        match byte {
            b'/' | b'.' | b'_' | b'-' => uri.push(char::from(*byte)),
            byte if byte.is_ascii_alphanumeric() => uri.push(char::from(*byte)),
            byte => uri.push_str(&format!("%{byte:02x}")),
        }
    }
    uri + "?immutable=1"
}

fn of_database(args: &Args) -> impl Fn(rusqlite::Error) -> Failure {
    |error| {
        let status = match error.sqlite_error_code() {
            Some(ErrorCode::NotADatabase | ErrorCode::DatabaseCorrupt) => failure::DATA,
            Some(ErrorCode::CannotOpen | ErrorCode::PermissionDenied) => failure::NO_INPUT,
            Some(ErrorCode::DatabaseBusy) => failure::NO,
            _ => failure::IO,
        };
        Failure::new(status, format!("{}: {error}", args.database.display()))
    }
}

/// Hidden by indicatif where there is no terminal.
fn progress_bar(facts: &Facts) -> ProgressBar {
    let bar = ProgressBar::new(facts.page_count.unsigned_abs());
    let style = ProgressStyle::with_template("{bar:30} {pos}/{len} pages  {eta} left");
    bar.with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}
