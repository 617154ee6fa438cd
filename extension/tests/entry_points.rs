//! The library as its hosts see it: its symbols, its entry points, and what they say to a host that is not as it should be.

mod support;

use std::ffi::{CStr, CString, c_char, c_int, c_uint, c_void};
use std::mem::transmute_copy;
use std::path::Path;
use std::process::Command;
use std::ptr;

use rusqlite::{Connection, ffi};
use support::{TestDb, holds_the_flock, library};

// Symbols. --------------------------------------------------------------------------------------------------

fn nm(option: &str) -> Vec<String> {
    let output = Command::new("nm").args(["-D", option]).arg(library()).output().expect("nm, from binutils");
    assert!(output.status.success());
    symbols(&String::from_utf8(output.stdout).unwrap())
}

/// The last word of each line, without a version: `                 U close@GLIBC_2.2.5`.
fn symbols(listing: &str) -> Vec<String> {
    let last_words = listing.lines().filter_map(|line| line.split_whitespace().next_back());
    last_words.map(|word| word.split('@').next().unwrap().to_owned()).collect()
}

#[test]
fn no_symbol_of_sqlite_is_undefined() {
    let of_sqlite =
        |symbols: Vec<String>| symbols.into_iter().filter(|name| name.contains("sqlite3")).count();
    let undefined = nm("--undefined-only");
    assert!(undefined.iter().any(|name| name == "flock"), "{undefined:?}");
    assert_eq!(of_sqlite(undefined), 0);
    assert_eq!(
        of_sqlite(symbols("                 U sqlite3_open\n                 U close@GLIBC_2.2.5\n")),
        1
    );
}

#[test]
fn what_is_exported_is_what_the_header_declares() {
    let header = include_str!("../../include/kanbanlock.h");
    let exported = nm("--defined-only");
    let four = [
        "kanbanlock_register_library",
        "kanbanlock_register_with",
        "sqlite3_kanbanlock_init",
        "sqlite3_kanbanlockdefault_init",
    ];
    assert_eq!(exported, four);
    for function in four {
        assert!(header.contains(&format!("int {function}(")), "{function}");
    }
}

// The library, loaded by hand. ------------------------------------------------------------------------------

type Init = unsafe extern "C" fn(*mut c_void, *mut *mut c_char, *const Slot) -> c_int;
type RegisterWith = unsafe extern "C" fn(*const Functions, c_uint, *mut c_char, c_int) -> c_int;
type RegisterLibrary = unsafe extern "C" fn(*mut c_void, c_uint, *mut c_char, c_int) -> c_int;

/// A place in `sqlite3_api_routines`.
type Slot = Option<unsafe extern "C" fn()>;

/// `kanbanlock_sqlite`.
#[repr(C)]
struct Functions {
    size: usize,
    functions: [Slot; 8],
}

/// A library, by dlopen(3).
struct Library(*mut c_void);

impl Library {
    fn open(path: &Path) -> Library {
        let path = CString::new(path.to_str().unwrap()).unwrap();
        // SAFETY: a library without initialisers that could hurt.
        let library = unsafe { libc::dlopen(path.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
        assert!(!library.is_null());
        Library(library)
    }

    /// # Safety
    /// `F` is the type of the function `name`.
    unsafe fn function<F>(&self, name: &CStr) -> F {
        // SAFETY: a loaded library.
        let symbol = unsafe { libc::dlsym(self.0, name.as_ptr()) };
        assert!(!symbol.is_null(), "{name:?}");
        // SAFETY: a function pointer of the type that the caller says.
        unsafe { transmute_copy(&symbol) }
    }

    /// The result code and message of `sqlite3_kanbanlock_init`.
    fn init(&self, routines: *const Slot) -> (c_int, String) {
        // SAFETY: its type.
        let init: Init = unsafe { self.function(c"sqlite3_kanbanlock_init") };
        let mut message = ptr::null_mut();
        // SAFETY: as SQLite would call it; the table is one of the tests below.
        let code = unsafe { init(ptr::null_mut(), &raw mut message, routines) };
        if message.is_null() {
            return (code, String::new());
        }
        // SAFETY: a NUL-terminated string from sqlite3_mprintf.
        let text = unsafe { CStr::from_ptr(message) }.to_str().unwrap().to_owned();
        // SAFETY: ditto; not used again.
        unsafe { ffi::sqlite3_free(message.cast()) };
        (code, text)
    }

    fn register_with(&self, functions: *const Functions, flags: c_uint) -> (c_int, String) {
        // SAFETY: its type.
        let register: RegisterWith = unsafe { self.function(c"kanbanlock_register_with") };
        // SAFETY: a structure of the tests below, and room as `message` says.
        message(|room, size| unsafe { register(functions, flags, room, size) })
    }

    fn register_library(&self, library: *mut c_void, flags: c_uint) -> (c_int, String) {
        // SAFETY: its type.
        let register: RegisterLibrary = unsafe { self.function(c"kanbanlock_register_library") };
        // SAFETY: a handle of the tests below, and room as `message` says.
        message(|room, size| unsafe { register(library, flags, room, size) })
    }
}

fn message(call: impl FnOnce(*mut c_char, c_int) -> c_int) -> (c_int, String) {
    let mut room = [0x2a_u8; 500];
    let code = call(room.as_mut_ptr().cast(), 500);
    (code, CStr::from_bytes_until_nul(&room).unwrap().to_str().unwrap().to_owned())
}

#[track_caller]
fn assert_refused((code, message): (c_int, String), what: &str, advice: &str) {
    assert_eq!(code, ffi::SQLITE_ERROR, "{message}");
    assert!(message.starts_with("kanbanlock: "), "{message}");
    assert!(message.contains(what) && message.contains(advice), "{message}");
}

// Tables of a host's functions. -----------------------------------------------------------------------------

fn slot<F>(function: F) -> Slot {
    assert_eq!(size_of::<F>(), size_of::<Slot>());
    // SAFETY: a function pointer, which the library casts back to its type.
    unsafe { transmute_copy(&function) }
}

macro_rules! version {
    ($number:literal) => {{
        unsafe extern "C" fn version() -> c_int {
            $number
        }
        slot::<unsafe extern "C" fn() -> c_int>(version)
    }};
}

/// The bundled SQLite's functions at their places, as if it were of another version.
fn routines(version: Slot, length: usize) -> Vec<Slot> {
    let mut table: Vec<Slot> = vec![None; 246];
    table[67] = version;
    table[69] = slot(ffi::sqlite3_mprintf as unsafe extern "C" fn(*const c_char, ...) -> *mut c_char);
    table[141] = slot(ffi::sqlite3_vfs_find as unsafe extern "C" fn(*const c_char) -> *mut ffi::sqlite3_vfs);
    table[142] =
        slot(ffi::sqlite3_vfs_register as unsafe extern "C" fn(*mut ffi::sqlite3_vfs, c_int) -> c_int);
    table[167] = slot(ffi::sqlite3_log as unsafe extern "C" fn(c_int, *const c_char, ...));
    table[189] = slot(
        ffi::sqlite3_uri_parameter as unsafe extern "C" fn(*const c_char, *const c_char) -> *const c_char,
    );
    table.truncate(length);
    table
}

/// The table right before a page that nobody may read: reading behind its end is a SIGSEGV.
fn before_a_guard_page(table: &[Slot]) -> *const Slot {
    const PAGE: usize = 4096;
    let bytes = size_of_val(table);
    assert!(bytes <= PAGE);
    let (read_write, private) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    // SAFETY: new memory, anywhere.
    let pages = unsafe { libc::mmap(ptr::null_mut(), 2 * PAGE, read_write, private, -1, 0) };
    assert_ne!(pages, libc::MAP_FAILED);
    // SAFETY: the second page of the two.
    let guard = unsafe { pages.byte_add(PAGE) };
    // SAFETY: nobody uses it.
    assert_eq!(unsafe { libc::mprotect(guard, PAGE, libc::PROT_NONE) }, 0);
    // SAFETY: within the first page.
    let start: *mut Slot = unsafe { guard.byte_sub(bytes) }.cast();
    // SAFETY: room for it, up to the guard page.
    unsafe { start.copy_from_nonoverlapping(table.as_ptr(), table.len()) };
    start
}

const OK_LOAD_PERMANENTLY: c_int = 256;

#[test]
fn a_sqlite_before_3_14_is_refused_and_its_table_is_not_read_behind_its_end() {
    // 3.13's table is longer; nothing behind sqlite3_mprintf is needed to refuse it.
    let old = before_a_guard_page(&routines(version!(3_013_000), 70));
    let refused = Library::open(library()).init(old);
    assert_refused(refused, "this SQLite is version 3.13.0", "needs 3.14 or later");
}

#[test]
fn a_sqlite_before_3_31_has_no_uri_key_and_is_not_asked_for_it() {
    let old = before_a_guard_page(&routines(version!(3_030_001), 244));
    assert_eq!(Library::open(library()).init(old), (OK_LOAD_PERMANENTLY, String::new()));
    let db = TestDb::new();
    assert!(holds_the_flock(&Connection::open(db.uri()).unwrap(), &db));
}

#[test]
fn a_host_without_what_is_needed_is_refused() {
    let kanbanlock = Library::open(library());
    let (code, message) = kanbanlock.init(ptr::null());
    assert_eq!((code, message.as_str()), (ffi::SQLITE_ERROR, ""), "nobody's memory for a message");
    for (slot, name) in [
        (141, "sqlite3_vfs_find"),
        (142, "sqlite3_vfs_register"),
        (167, "sqlite3_log"),
        (189, "sqlite3_uri_parameter"),
    ] {
        let mut table = routines(version!(3_014_000), 200);
        table[slot] = None;
        assert_refused(kanbanlock.init(table.as_ptr()), name, "built without");
    }
    let mut table = routines(version!(3_014_000), 200);
    unsafe extern "C" fn no() -> c_int {
        0
    }
    table[144] = slot::<unsafe extern "C" fn() -> c_int>(no);
    assert_refused(kanbanlock.init(table.as_ptr()), "SQLITE_THREADSAFE=0", "use a build with");
}

#[test]
fn a_host_that_passes_its_functions_is_told_what_is_wrong_with_them() {
    let kanbanlock = Library::open(library());
    let table = routines(version!(3_030_001), 200);
    let functions = [table[67], None, table[69], table[167], table[141], table[142], table[189], None];
    let right = Functions { size: size_of::<Functions>(), functions };
    assert_eq!(kanbanlock.register_with(&raw const right, 0), (ffi::SQLITE_OK, String::new()));

    assert_refused(kanbanlock.register_with(ptr::null(), 0), "no kanbanlock_sqlite", "was passed");
    assert_refused(
        kanbanlock.register_with(&raw const right, 2),
        "unknown flags 0x2",
        "KANBANLOCK_MAKE_DEFAULT",
    );
    let short = Functions { size: 8, ..right };
    assert_refused(kanbanlock.register_with(&raw const short, 0), "size is 8", "sizeof(kanbanlock_sqlite)");
    for (place, name) in
        [(0, "libversion_number"), (2, "mprintf"), (3, "log"), (4, "vfs_find"), (5, "vfs_register")]
    {
        let mut functions = functions;
        functions[place] = None;
        let lacking = Functions { size: size_of::<Functions>(), functions };
        let refused = kanbanlock.register_with(&raw const lacking, 0);
        assert_refused(
            refused,
            &format!("kanbanlock_sqlite.{name} is NULL"),
            &format!("pass sqlite3_{name}"),
        );
    }
}

#[test]
fn a_library_without_sqlite_is_told_so() {
    let kanbanlock = Library::open(library());
    let refused = kanbanlock.register_library(kanbanlock.0, 0);
    assert_refused(refused, "no sqlite3_libversion_number there", "use sqlite3_load_extension");
    // This program has a SQLite, but does not export it.
    assert_refused(kanbanlock.register_library(ptr::null_mut(), 0), "no sqlite3_", "statically");
    // No room for a message is no crash.
    // SAFETY: its type.
    let register: RegisterLibrary = unsafe { kanbanlock.function(c"kanbanlock_register_library") };
    // SAFETY: null and 0 promise nothing.
    assert_eq!(unsafe { register(kanbanlock.0, 0, ptr::null_mut(), 0) }, ffi::SQLITE_ERROR);
}

#[test]
fn another_copy_of_the_library_in_the_same_sqlite_is_refused() {
    let db = TestDb::new();
    let table = routines(version!(3_030_001), 200);
    assert_eq!(Library::open(library()).init(table.as_ptr()).0, OK_LOAD_PERMANENTLY);
    let copy = db.dir().join("libkanbanlock.so");
    std::fs::copy(library(), &copy).unwrap();
    let refused = Library::open(&copy).init(table.as_ptr());
    assert_refused(refused, "has a VFS named \"kanbanlock\" already", "It is in force");
    assert!(holds_the_flock(&Connection::open(db.uri()).unwrap(), &db));
}

#[test]
fn the_library_stays_loaded_when_its_host_closes_it() {
    let dir = tempfile::tempdir().unwrap();
    let copy = dir.path().join("libkanbanlock.so");
    std::fs::copy(library(), &copy).unwrap();
    let library = Library::open(&copy);
    // SAFETY: an open handle, not used again.
    assert_eq!(unsafe { libc::dlclose(library.0) }, 0);
    let path = CString::new(copy.to_str().unwrap()).unwrap();
    // SAFETY: asks only whether it is loaded.
    let again = unsafe { libc::dlopen(path.as_ptr(), libc::RTLD_NOW | libc::RTLD_NOLOAD) };
    assert!(!again.is_null());
}

// By SQLite itself. -----------------------------------------------------------------------------------------

#[test]
fn loading_it_twice_or_by_a_wrong_entry_point_hurts_nobody() {
    let db = TestDb::new();
    for _ in 0..2 {
        let boot = Connection::open_in_memory().unwrap();
        // SAFETY: nothing untrusted runs on this connection while loading is enabled.
        unsafe { boot.load_extension_enable() }.unwrap();
        for entry_point in [None, Some("sqlite3_kanbanlock_init"), None] {
            // SAFETY: our own library.
            unsafe { boot.load_extension(library(), entry_point) }.unwrap();
        }
        // SAFETY: our own library; SQLite calls nothing if there is no such symbol.
        let wrong = unsafe { boot.load_extension(library(), Some("sqlite3_kanbanlok_init")) };
        assert!(wrong.unwrap_err().to_string().contains("undefined symbol: sqlite3_kanbanlok_init"));
    }
    assert!(holds_the_flock(&Connection::open(db.uri()).unwrap(), &db));
}

// From C. ---------------------------------------------------------------------------------------------------

#[test]
fn the_header_compiles_without_a_warning_in_c_and_cpp() {
    let header = Path::new(env!("CARGO_MANIFEST_DIR")).join("../include/kanbanlock.h");
    let strict = ["-fsyntax-only", "-Wall", "-Wextra", "-Werror", "-pedantic"];
    for language in [["-xc", "-std=c99"], ["-xc", "-std=c17"], ["-xc++", "-std=c++11"]] {
        let mut gcc = Command::new("gcc");
        gcc.args(strict).args(language).arg("-include").arg(&header).arg("/dev/null");
        assert!(gcc.status().unwrap().success(), "{gcc:?}");
    }
}

/// A C program that is linked with both libraries, and passes SQLite's functions.
#[test]
fn a_c_program_registers_and_holds_the_flock() {
    if !Path::new("/usr/include/sqlite3.h").exists() {
        println!("SKIPPED: no sqlite3.h (Debian: libsqlite3-dev)");
        return;
    }
    let db = TestDb::new();
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/host.c");
    let program = db.dir().join("host");
    let mut gcc = Command::new("gcc");
    gcc.args(["-std=c99", "-Wall", "-Wextra", "-Werror", "-pedantic", "-I"]);
    gcc.arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("../include")).arg("-o").arg(&program).arg(source);
    gcc.arg(library()).arg("-lsqlite3");
    assert!(gcc.status().unwrap().success(), "{gcc:?}");
    let output = Command::new(&program).arg(db.path()).output().unwrap();
    let (printed, complaints) =
        (String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap());
    assert!(output.status.success(), "{printed}{complaints}");
    assert_eq!(printed, "free before, held in the transaction, free after\n");
}
