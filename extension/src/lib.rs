//! kanbanlock as a loadable extension: a thin shell that finds the functions of the host's SQLite and registers the VFS.
//!
//! Nothing of the shim is here, and nothing is linked with SQLite: every function comes from the host, so that the one
//! library serves whichever copies of SQLite a process has, each with a registration of its own.
//!
//! | entry point | for |
//! |---|---|
//! | `sqlite3_kanbanlock_init` | `.load libkanbanlock`, `sqlite3_load_extension()`: registers the VFS "kanbanlock" |
//! | `sqlite3_kanbanlockdefault_init` | the same, and makes it the default VFS |
//! | `kanbanlock_register_with` | hosts without sqlite3_load_extension(): they pass the functions |
//! | `kanbanlock_register_library` | ditto: they pass the handle of a loaded library, from dlopen(3) |
//!
//! `include/kanbanlock.h` is the manual of all four.
//!
//! ## Invariants
//! - No panic crosses the C interface: `answer` catches it, and says so like any other failure.
//! - After a success the library stays loaded until the process ends, whatever the host does: SQLITE_OK_LOAD_PERMANENTLY,
//!   and `-z nodelete` (`build.rs`).
//!
//! Uses: `functions`.

#![cfg_attr(not(test), warn(clippy::unwrap_used, clippy::expect_used, clippy::incompatible_msrv))]
#![warn(clippy::multiple_unsafe_ops_per_block)]

#[cfg(panic = "abort")]
compile_error!("a panic must not end the host: build with panic = \"unwind\", the default");

mod functions;

use std::ffi::{CString, c_char, c_int, c_uint, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};

use functions::{KanbanlockSqlite, Routines};
use shim::{HostApi, Options, ffi::Mprintf};

/// <https://www.sqlite.org/rescode.html>
const SQLITE_OK: c_int = 0;
const SQLITE_ERROR: c_int = 1;
/// "the extension … is not to be unloaded when the database connection closes". Since 3.14.
const SQLITE_OK_LOAD_PERMANENTLY: c_int = 256;

/// `KANBANLOCK_MAKE_DEFAULT` in kanbanlock.h.
const MAKE_DEFAULT: c_uint = 1;

/// Registers the VFS "kanbanlock" with the copy of SQLite that loads this library.
///
/// # Safety
///
/// SQLite's call: <https://www.sqlite.org/loadext.html#programming_loadable_extensions>.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sqlite3_kanbanlock_init(
    _db: *mut c_void,
    error: *mut *mut c_char,
    routines: *const Routines,
) -> c_int {
    // SAFETY: as the caller says.
    unsafe { load(error, routines, false) }
}

/// The same, and makes it the default VFS: connections that are opened by plain path from then on go through it.
///
/// # Safety
///
/// SQLite's call, as for [`sqlite3_kanbanlock_init`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sqlite3_kanbanlockdefault_init(
    _db: *mut c_void,
    error: *mut *mut c_char,
    routines: *const Routines,
) -> c_int {
    // SAFETY: as the caller says.
    unsafe { load(error, routines, true) }
}

/// # Safety
///
/// The arguments of an extension's entry point.
unsafe fn load(error: *mut *mut c_char, routines: *const Routines, make_default: bool) -> c_int {
    let answered = answer(|| {
        // SAFETY: the table of the SQLite that calls, valid during the call.
        let api = unsafe { functions::of_routines(routines) }?;
        // SAFETY: its functions. sqlite3_load_extension() is code of that copy, so it is loaded; that it stays so until the
        // process ends is what a host that dlclose()s its SQLite would break, with any VFS.
        unsafe { register(api, make_default) }
    });
    let Err(message) = answered else { return SQLITE_OK_LOAD_PERMANENTLY };
    // SAFETY: as above.
    let mprintf = unsafe { functions::mprintf_of_routines(routines) };
    if let Some(mprintf) = mprintf.filter(|_| !error.is_null()) {
        // SAFETY: sqlite3_mprintf of the SQLite that calls: it frees the message with its own sqlite3_free.
        let message = unsafe { allocate(mprintf, &message) };
        // SAFETY: not null, and then SQLite's place for a message.
        unsafe { error.write(message) };
    }
    SQLITE_ERROR
}

/// Registers the VFS "kanbanlock" with the copy of SQLite that these functions are of.
///
/// # Safety
///
/// `sqlite` is null or points to a `kanbanlock_sqlite` whose `size` bytes are readable, with functions as in
/// [`HostApi`]; `message` is null or has `message_size` writable bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kanbanlock_register_with(
    sqlite: *const KanbanlockSqlite,
    flags: c_uint,
    message: *mut c_char,
    message_size: c_int,
) -> c_int {
    let answered = answer(|| {
        let make_default = parse_flags(flags)?;
        // SAFETY: as the caller says.
        let api = unsafe { functions::of_struct(sqlite) }?;
        // SAFETY: as the caller says.
        unsafe { register(api, make_default) }
    });
    // SAFETY: as the caller says.
    unsafe { tell(answered, message, message_size) }
}

/// Registers the VFS "kanbanlock" with the copy of SQLite that dlsym(3) finds through this handle.
///
/// # Safety
///
/// `library` is null (the program itself) or a handle that dlopen(3) has returned, and what dlsym(3) finds through it
/// under SQLite's names are SQLite's functions, all of one copy; `message` as for [`kanbanlock_register_with`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kanbanlock_register_library(
    library: *mut c_void,
    flags: c_uint,
    message: *mut c_char,
    message_size: c_int,
) -> c_int {
    let answered = answer(|| {
        let make_default = parse_flags(flags)?;
        // SAFETY: as the caller says.
        let api = unsafe { functions::of_library(library) }?;
        // SAFETY: as the caller says.
        unsafe { register(api, make_default) }
    });
    // SAFETY: as the caller says.
    unsafe { tell(answered, message, message_size) }
}

/// # Safety
///
/// As for [`shim::register_with`].
unsafe fn register(api: HostApi, make_default: bool) -> Result<(), String> {
    // SAFETY: as the caller says.
    let registered = unsafe { shim::register_with(api, &Options::new().make_default(make_default)) };
    registered.map_err(|error| match error {
        // The library's advice is for Rust programs, which can choose a name.
        shim::RegisterError::NameTaken { name } => format!(
            "this SQLite has a VFS named {name:?} already, from another copy of kanbanlock (linked into the program, or a \
             libkanbanlock.so from another place). It is in force: use it, and do not load this one"
        ),
        error => error.to_string(),
    })
}

fn parse_flags(flags: c_uint) -> Result<bool, String> {
    match flags & !MAKE_DEFAULT {
        0 => Ok(flags & MAKE_DEFAULT != 0),
        unknown => Err(format!("unknown flags {unknown:#x}: pass 0 or KANBANLOCK_MAKE_DEFAULT (1)")),
    }
}

/// What `register` has to say to the host, with a panic as one more failure.
fn answer(register: impl FnOnce() -> Result<(), String>) -> Result<(), String> {
    let panicked =
        |_| Err("a panic while registering (a bug: please report it). Nothing is protected".to_owned());
    let answered = catch_unwind(AssertUnwindSafe(register)).unwrap_or_else(panicked);
    answered.map_err(|message| format!("kanbanlock: {message}"))
}

/// The message in memory that the host frees; null if there is none left.
///
/// # Safety
///
/// `mprintf` is sqlite3_mprintf.
unsafe fn allocate(mprintf: Mprintf, message: &str) -> *mut c_char {
    let message = CString::new(message).unwrap_or_default();
    // SAFETY: the format `%s` takes exactly one NUL-terminated string.
    unsafe { mprintf(c"%s".as_ptr(), message.as_ptr()) }
}

/// The result code, and the message as far as there is room for it; an empty one on success.
///
/// # Safety
///
/// `message` is null or has `size` writable bytes.
unsafe fn tell(answered: Result<(), String>, message: *mut c_char, size: c_int) -> c_int {
    let (code, text) = match answered {
        Ok(()) => (SQLITE_OK, String::new()),
        Err(text) => (SQLITE_ERROR, text),
    };
    let room = usize::try_from(size).unwrap_or(0);
    if !message.is_null() && room > 0 {
        let mut lengths = (0..room.min(text.len() + 1)).rev();
        let length = lengths.find(|&length| text.is_char_boundary(length)).unwrap_or(0);
        // SAFETY: `length` bytes fit into `room`, which the caller vouches for; our own string does not overlap.
        unsafe { message.copy_from_nonoverlapping(text.as_ptr().cast(), length) };
        // SAFETY: `length < room`.
        let end = unsafe { message.add(length) };
        // SAFETY: ditto.
        unsafe { end.write(0) };
    }
    code
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_a_failure_with_a_message() {
        let answered = answer(|| panic!("on purpose"));
        assert!(answered.unwrap_err().starts_with("kanbanlock: a panic while registering"));
        assert_eq!(answer(|| Ok(())), Ok(()));
    }

    #[test]
    fn a_message_is_cut_to_its_room_and_ends_in_nul() {
        let told = |text: &str, size: usize| {
            let mut room = [0x2a_u8; 8];
            // SAFETY: `size` is at most 8.
            let code = unsafe {
                tell(Err(text.to_owned()), room.as_mut_ptr().cast(), c_int::try_from(size).unwrap())
            };
            assert_eq!(code, SQLITE_ERROR);
            room
        };
        assert_eq!(&told("abc", 8), b"abc\0****");
        assert_eq!(&told("abcdefghij", 8), b"abcdefg\0");
        assert_eq!(&told("abcé", 5), b"abc\0****", "not half of a character");
        assert_eq!(&told("abc", 1), b"\0*******");
        assert_eq!(&told("abc", 0), b"********");
        // SAFETY: null, and a size that promises nothing.
        assert_eq!(unsafe { tell(Ok(()), std::ptr::null_mut(), -1) }, SQLITE_OK);
    }

    #[test]
    fn flags_that_nobody_knows_are_refused() {
        assert_eq!(parse_flags(0), Ok(false));
        assert_eq!(parse_flags(MAKE_DEFAULT), Ok(true));
        assert!(parse_flags(6).unwrap_err().contains("unknown flags 0x6"));
    }
}
