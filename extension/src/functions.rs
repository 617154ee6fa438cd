//! The functions of the host's SQLite, from each of the places that a host may have them in.
//!
//! `sqlite3_api_routines` is a table of function pointers that only ever grows at its end, so a function is named by its
//! place in it ([`slot`]), and a late one is looked for only in a SQLite that is new enough to have it. The places are held
//! against `sqlite3ext.h` by a test below.
//!
//! Sources: <https://www.sqlite.org/loadext.html>, `sqlite3ext.h`, dlsym(3).
//!
//! Uses: nothing.

use std::ffi::{CStr, c_void};
use std::mem::{size_of, transmute, transmute_copy};

use shim::{HostApi, ffi};

type Function = unsafe extern "C" fn();

/// Places in `sqlite3_api_routines`.
mod slot {
    pub const LIBVERSION_NUMBER: usize = 67;
    pub const MPRINTF: usize = 69;
    pub const VFS_FIND: usize = 141;
    pub const VFS_REGISTER: usize = 142;
    pub const XTHREADSAFE: usize = 144;
    pub const LOG: usize = 167;
    pub const URI_PARAMETER: usize = 189;
    pub const URI_KEY: usize = 245;
}

/// The oldest SQLite whose table has all of the above but the last (and the oldest that kanbanlock supports).
const OLDEST: std::ffi::c_int = 3_014_000;
/// "Version 3.31.0 and later", sqlite3ext.h.
const URI_KEY_SINCE: std::ffi::c_int = 3_031_000;

/// `sqlite3_api_routines`, of which nothing is known but the places above.
#[repr(C)]
pub struct Routines {
    _opaque: [u8; 0],
}

/// # Safety
///
/// `routines` is the table of a copy of SQLite that is new enough to have this place.
unsafe fn at(routines: *const Routines, slot: usize) -> Option<Function> {
    let table = routines.cast::<Option<Function>>();
    // SAFETY: the table is an array of function pointers, and long enough, says the caller.
    let place = unsafe { table.add(slot) };
    // SAFETY: ditto; a function that was left out of the build is NULL there.
    unsafe { place.read() }
}

/// One function of a host as its own type.
///
/// # Safety
///
/// `function` is of type `F`, a function pointer.
unsafe fn typed<F>(function: Function) -> F {
    const { assert!(size_of::<F>() == size_of::<Function>()) };
    // SAFETY: as the caller says.
    unsafe { transmute_copy(&function) }
}

/// # Safety
///
/// `routines` is null or what SQLite has passed to an extension's entry point.
pub unsafe fn mprintf_of_routines(routines: *const Routines) -> Option<ffi::Mprintf> {
    if routines.is_null() {
        return None;
    }
    // SAFETY: as the caller says; this place is as old as loadable extensions' vtables with it (3.3.13).
    let mprintf = unsafe { at(routines, slot::MPRINTF) }?;
    // SAFETY: SQLite's own table: at this place is sqlite3_mprintf.
    Some(unsafe { typed(mprintf) })
}

/// # Errors
///
/// What the table lacks.
///
/// # Safety
///
/// `routines` is null or what SQLite has passed to an extension's entry point.
pub unsafe fn of_routines(routines: *const Routines) -> Result<HostApi, String> {
    if routines.is_null() {
        return Err("no sqlite3_api_routines: this entry point is for sqlite3_load_extension()".to_owned());
    }
    let missing = |name: &str| format!("this SQLite was built without {name}, which kanbanlock needs");
    // SAFETY: as the caller says.
    let libversion_number = unsafe { at(routines, slot::LIBVERSION_NUMBER) };
    let libversion_number = libversion_number.ok_or_else(|| missing("sqlite3_libversion_number"))?;
    // SAFETY: SQLite's own table: what stands at a function's place is that function.
    let libversion_number: ffi::LibversionNumber = unsafe { typed(libversion_number) };
    // SAFETY: sqlite3_libversion_number may be called at any time.
    let version = unsafe { libversion_number() };
    if version < OLDEST {
        return Err(shim::RegisterError::TooOld { version }.to_string());
    }
    let late = |slot, since| {
        // SAFETY: as the caller says, and new enough.
        (version >= since).then(|| unsafe { at(routines, slot) }).flatten()
    };
    let find = |slot, name| late(slot, OLDEST).ok_or_else(|| missing(name));
    let mprintf = find(slot::MPRINTF, "sqlite3_mprintf")?;
    let log = find(slot::LOG, "sqlite3_log")?;
    let vfs_find = find(slot::VFS_FIND, "sqlite3_vfs_find")?;
    let vfs_register = find(slot::VFS_REGISTER, "sqlite3_vfs_register")?;
    let uri_parameter = find(slot::URI_PARAMETER, "sqlite3_uri_parameter")?;
    let threadsafe = late(slot::XTHREADSAFE, OLDEST);
    let uri_key = late(slot::URI_KEY, URI_KEY_SINCE);
    Ok(HostApi {
        libversion_number,
        // SAFETY: ditto, each at its own place.
        threadsafe: threadsafe.map(|function| unsafe { typed(function) }),
        // SAFETY: ditto.
        mprintf: unsafe { typed(mprintf) },
        // SAFETY: ditto.
        log: unsafe { typed(log) },
        // SAFETY: ditto.
        vfs_find: unsafe { typed(vfs_find) },
        // SAFETY: ditto.
        vfs_register: unsafe { typed(vfs_register) },
        // SAFETY: ditto.
        uri_parameter: unsafe { typed(uri_parameter) },
        // SAFETY: ditto.
        uri_key: uri_key.map(|function| unsafe { typed(function) }),
    })
}

/// `kanbanlock_sqlite` in kanbanlock.h.
#[repr(C)]
pub struct KanbanlockSqlite {
    size: usize,
    libversion_number: Option<ffi::LibversionNumber>,
    threadsafe: Option<ffi::Threadsafe>,
    mprintf: Option<ffi::Mprintf>,
    log: Option<ffi::Log>,
    vfs_find: Option<ffi::VfsFind>,
    vfs_register: Option<ffi::VfsRegister>,
    uri_parameter: Option<ffi::UriParameter>,
    uri_key: Option<ffi::UriKey>,
}

/// # Errors
///
/// What the structure lacks.
///
/// # Safety
///
/// `sqlite` is null or points to a structure of which `size` bytes are readable.
pub unsafe fn of_struct(sqlite: *const KanbanlockSqlite) -> Result<HostApi, String> {
    if sqlite.is_null() {
        return Err("no kanbanlock_sqlite was passed".to_owned());
    }
    // SAFETY: not null; `size` comes first.
    let size = unsafe { sqlite.cast::<usize>().read() };
    if size < size_of::<KanbanlockSqlite>() {
        return Err(format!(
            "kanbanlock_sqlite.size is {size}, not {}: set it to sizeof(kanbanlock_sqlite), and compile with the \
             kanbanlock.h of this version",
            size_of::<KanbanlockSqlite>()
        ));
    }
    // SAFETY: that many bytes are readable.
    let sqlite = unsafe { sqlite.read() };
    let missing = |name: &str| format!("kanbanlock_sqlite.{name} is NULL: pass sqlite3_{name} there");
    Ok(HostApi {
        libversion_number: sqlite.libversion_number.ok_or_else(|| missing("libversion_number"))?,
        threadsafe: sqlite.threadsafe,
        mprintf: sqlite.mprintf.ok_or_else(|| missing("mprintf"))?,
        log: sqlite.log.ok_or_else(|| missing("log"))?,
        vfs_find: sqlite.vfs_find.ok_or_else(|| missing("vfs_find"))?,
        vfs_register: sqlite.vfs_register.ok_or_else(|| missing("vfs_register"))?,
        uri_parameter: sqlite.uri_parameter.ok_or_else(|| missing("uri_parameter"))?,
        uri_key: sqlite.uri_key,
    })
}

/// # Errors
///
/// What the library lacks.
///
/// # Safety
///
/// `library` is null or a handle from dlopen(3), and its symbols with SQLite's names are SQLite's functions.
pub unsafe fn of_library(library: *mut c_void) -> Result<HostApi, String> {
    // dlopen(NULL) is the program itself; as a handle, NULL is RTLD_DEFAULT, which finds the same and what else is global.
    let symbol = |name: &CStr| {
        // SAFETY: a handle, says the caller, and a NUL-terminated name.
        let symbol = unsafe { libc::dlsym(library, name.as_ptr()) };
        // SAFETY: a function's address, or null: the size and null of Option<Function>. POSIX demands that dlsym's answer
        // can be used so.
        unsafe { transmute::<*mut c_void, Option<Function>>(symbol) }
    };
    let find = |name: &CStr| {
        symbol(name).ok_or_else(|| {
            format!(
                "no {} there: pass the handle of the library that contains SQLite, or of one that is linked with it \
                 (if SQLite is linked statically and its symbols are hidden, nobody can find them from outside: use \
                 sqlite3_load_extension)",
                name.to_string_lossy()
            )
        })
    };
    let libversion_number = find(c"sqlite3_libversion_number")?;
    let mprintf = find(c"sqlite3_mprintf")?;
    let log = find(c"sqlite3_log")?;
    let vfs_find = find(c"sqlite3_vfs_find")?;
    let vfs_register = find(c"sqlite3_vfs_register")?;
    let uri_parameter = find(c"sqlite3_uri_parameter")?;
    Ok(HostApi {
        // SAFETY: the function of that name, says the caller; here and below.
        libversion_number: unsafe { typed(libversion_number) },
        // SAFETY: ditto.
        threadsafe: symbol(c"sqlite3_threadsafe").map(|function| unsafe { typed(function) }),
        // SAFETY: ditto.
        mprintf: unsafe { typed(mprintf) },
        // SAFETY: ditto.
        log: unsafe { typed(log) },
        // SAFETY: ditto.
        vfs_find: unsafe { typed(vfs_find) },
        // SAFETY: ditto.
        vfs_register: unsafe { typed(vfs_register) },
        // SAFETY: ditto.
        uri_parameter: unsafe { typed(uri_parameter) },
        // SAFETY: ditto.
        uri_key: symbol(c"sqlite3_uri_key").map(|function| unsafe { typed(function) }),
    })
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::path::Path;
    use std::process::{Command, Stdio};

    use super::*;

    /// Asks the compiler whether this is so, with SQLite's own header.
    fn compiles(assertion: &str) -> bool {
        let mut gcc = Command::new("gcc")
            .args(["-std=c11", "-fsyntax-only", "-x", "c", "-"])
            .stdin(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("gcc, which builds the bundled SQLite too");
        let source =
            format!("#include <stddef.h>\n#include <sqlite3ext.h>\n_Static_assert({assertion}, \"\");\n");
        gcc.stdin.take().unwrap().write_all(source.as_bytes()).unwrap();
        gcc.wait().unwrap().success()
    }

    #[test]
    fn each_function_stands_where_sqlite3ext_h_has_it() {
        if !Path::new("/usr/include/sqlite3ext.h").exists() {
            println!("SKIPPED: no sqlite3ext.h (Debian: libsqlite3-dev)");
            return;
        }
        let stands_at = |name: &str, slot: usize| {
            compiles(&format!(
                "offsetof(struct sqlite3_api_routines, {name}) == {slot} * sizeof(void (*)(void))"
            ))
        };
        for (name, slot) in [
            ("libversion_number", slot::LIBVERSION_NUMBER),
            ("mprintf", slot::MPRINTF),
            ("vfs_find", slot::VFS_FIND),
            ("vfs_register", slot::VFS_REGISTER),
            ("xthreadsafe", slot::XTHREADSAFE),
            ("log", slot::LOG),
            ("uri_parameter", slot::URI_PARAMETER),
            ("uri_key", slot::URI_KEY),
        ] {
            assert!(stands_at(name, slot), "{name}");
            assert!(!stands_at(name, slot + 1), "{name}: the check itself can fail");
        }
    }
}
