//! The feature `tracing`: what the shim writes to SQLite's log is an event of the crate `tracing`, too.
//!
//!     cargo test --features tracing --test events_tracing

mod support;

use std::fmt::Debug;
use std::sync::Once;

use support::events::{self, Seen, tests_with};
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Metadata, Subscriber};

struct Collector;

impl Subscriber for Collector {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn event(&self, event: &Event<'_>) {
        let mut fields = Fields(Seen {
            level: event.metadata().level().to_string(),
            target: event.metadata().target().to_owned(),
            message: String::new(),
            code: None,
            database: None,
            waited_ms: None,
        });
        event.record(&mut fields);
        events::seen(fields.0);
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
}

struct Fields(Seen);

impl Visit for Fields {
    fn record_i64(&mut self, field: &Field, value: i64) {
        assert_eq!(field.name(), "code");
        self.0.code = Some(value);
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        assert_eq!(field.name(), "waited_ms");
        self.0.waited_ms = Some(value);
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        assert_eq!(field.name(), "database");
        self.0.database = Some(value.to_owned());
    }

    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        assert_eq!(field.name(), "message");
        self.0.message = format!("{value:?}");
    }
}

fn install() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| tracing::subscriber::set_global_default(Collector).unwrap());
}

#[test]
fn agent_process() {
    support::agent::serve_if_asked();
}

tests_with!(install);
