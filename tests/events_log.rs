//! The feature `log`: what the shim writes to SQLite's log is a record of the crate `log`, too.
//!
//!     cargo test --features log --test events_log

mod support;

use std::sync::Once;

use log::kv::Key;
use log::{LevelFilter, Log, Metadata, Record};
use support::events::{self, Seen, tests_with};

struct Collector;

impl Log for Collector {
    fn enabled(&self, _: &Metadata) -> bool {
        true
    }

    fn log(&self, record: &Record) {
        let field = |name| record.key_values().get(Key::from_str(name));
        events::seen(Seen {
            level: record.level().to_string(),
            target: record.target().to_owned(),
            message: record.args().to_string(),
            code: field("code").and_then(|code| code.to_i64()),
            database: field("database").and_then(|path| path.to_borrowed_str().map(str::to_owned)),
            waited_ms: field("waited_ms").and_then(|waited| waited.to_u64()),
        });
    }

    fn flush(&self) {}
}

fn install() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        log::set_logger(&Collector).unwrap();
        log::set_max_level(LevelFilter::Trace);
    });
}

#[test]
fn agent_process() {
    support::agent::serve_if_asked();
}

tests_with!(install);
