//! Two flags for the linker, for this library alone.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    // A library that SQLite calls into must not be unloaded: with this, dlclose(3) keeps it. SQLITE_OK_LOAD_PERMANENTLY
    // asks sqlite3_load_extension() for the same; this holds for the hosts that load it by themselves, too.
    println!("cargo::rustc-cdylib-link-arg=-Wl,-z,nodelete");
    // As `strip = "symbols"`, which the published library, built without this package, would be warned of.
    if std::env::var_os("PROFILE").is_some_and(|profile| profile == "release") {
        println!("cargo::rustc-cdylib-link-arg=-Wl,--strip-all");
    }
}
