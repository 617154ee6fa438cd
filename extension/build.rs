//! One flag for the linker: a library that SQLite calls into must not be unloaded.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    // dlclose(3) keeps it then. SQLITE_OK_LOAD_PERMANENTLY asks sqlite3_load_extension() for the same; this holds for
    // the hosts that load it by themselves, too.
    println!("cargo::rustc-cdylib-link-arg=-Wl,-z,nodelete");
}
