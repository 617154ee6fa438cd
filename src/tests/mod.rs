//! Unit tests that look at more than one module; those of a single module stand at its end.
//!
//! Three of them are about the shim's heart, and need no SQLite and no file:
//!
//! | file | real | modelled | explored |
//! |---|---|---|---|
//! | `transitions.rs` | `state.rs` | – | each reachable state × each call × each answer: exhaustive |
//! | `model.rs` | `state.rs` | the driver's steps, os_unix, SQLite's order of calls | each interleaving of 2–4 connections: exhaustive |
//! | `simulation.rs` | `state.rs`, `driver.rs` | the gate, os_unix | random calls and faults, seeded |
//!
//! `unix_locks.rs` is the model of os_unix that the last two share. Each shows, beside its tests, that they can
//! fail: deliberately wrong tables, designs and drivers have to be found out. `cargo test --lib -- --nocapture`
//! prints the numbers of states, and the counterexamples.

mod layout;
mod model;
mod poison;
mod queue;
mod simulation;
mod transitions;
mod unix_locks;
pub mod world;
