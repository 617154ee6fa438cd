//! What the lock costs: the benchmark of kanbanlock's overhead, and the generator of README's table.
//!
//! ```text
//! cargo bench --bench overhead                       all of it, about six minutes
//! cargo bench --bench overhead -- --quick            a look, a quarter of a minute
//! cargo bench --bench overhead -- 'kanban, WAL'      a part of it, by criterion's filter
//! cargo test --bench overhead                        each lane once, verified but not measured
//!
//! KANBANLOCK_BENCH_TABLE=README.md cargo bench --bench overhead
//!                                                    all of it, and the table goes into README.md
//! ```
//!
//! # What is compared
//!
//! Each workload is a transaction (or an open/close), a journal mode and a place: tmpfs with
//! `synchronous=OFF`, where a transaction is cheapest and the lock therefore looks worst, and the disk with
//! `synchronous=NORMAL`, the usual case. Two more are pairs of SQLite's lock calls by themselves (`lock_calls.rs`),
//! which say what close-proof locks add to each. A workload is run by up to five *lanes*:
//!
//! | lane | what it is |
//! |---|---|
//! | `unix` | stock SQLite: the baseline |
//! | `unix again` | the same once more. Its "overhead" is zero by construction, so what is printed for it is the noise floor (an A/A test) |
//! | `kanbanlock` | the same statements through `?vfs=kanbanlock` |
//! | `app-level flock` | stock SQLite; the application wraps `BEGIN IMMEDIATE … COMMIT` in its own flock, on a file it keeps open |
//! | `close-proof` | lock calls only: stock's `unix` VFS in a process that has registered kanbanlock, so that its locks are close-proof and nothing else differs |
//! | `opted out` | lock calls only: the same, but an idle kanbanlock connection to the file says `kanbanlock_close_proof=off` |
//! | `flock pair` | no SQLite: one `flock(LOCK_EX)` and one `flock(LOCK_UN)`. Less than this no such lock can cost |
//!
//! # How, and why so
//!
//! The differences to be seen are below a microsecond, and a machine's speed drifts by more than that within
//! seconds. Criterion measures one benchmark after the other, so that drift would be booked as overhead.
//! Hence:
//!
//! - **Every lane is a process of its own**, this executable started again (`client.rs`), and only those
//!   that are to have kanbanlock call [`kanbanlock::register`]. In one process there might be no stock lane left:
//!   what registration installs, the system calls of close-proof locks for one, serves all of its unix VFSes.
//! - **The lanes run interleaved** (`sitting.rs`): in each *round* every lane runs one small batch, timed
//!   inside its process while the others wait, in an order that changes so that each lane follows each
//!   other equally often. Lanes are compared within a round, never across.
//! - **A *sitting* is one set of fresh processes on fresh copies of one database**, and it is the unit of
//!   the statistics (`table.rs`), not the round: where the loader and the allocator happen to put things
//!   makes a process faster or slower for all its life, and more rounds do not average that out.
//! - **Criterion is fed from the same sittings.** Each of its samples is one sitting; `iter_custom` returns
//!   the time of the lane that the benchmark is named after, and the table takes all of them. So criterion
//!   does what it is good at (absolute figures, history, `--baseline`), and there is no second harness.
//!
//! A sitting also verifies itself, or the run ends with an error: an outside process (the parent) sees the
//! flock on `<db>.lock` held inside a write transaction of exactly those lanes that should hold it, and the
//! database afterwards holds exactly the transactions that were asked for, and is whole. For the lock calls it
//! also sees in `/proc/<pid>/fdinfo` that the lane's locks belong to whom they should, process or open file description.

mod client;
mod lock_calls;
mod machine;
mod markers;
mod sitting;
mod stats;
mod table;
mod workload;

use std::cell::RefCell;
use std::process::ExitCode;
use std::time::Duration;

use criterion::{Criterion, SamplingMode};

use crate::machine::Machine;
use crate::sitting::{Sitting, Template};
use crate::table::Results;
use crate::workload::Place;

/// A benchmark has nothing to recover: any error ends the run with its text.
type Result<T, E = Box<dyn std::error::Error>> = std::result::Result<T, E>;

/// Names the Markdown file whose table is to be replaced by this run's.
const TABLE: &str = "KANBANLOCK_BENCH_TABLE";

fn main() -> ExitCode {
    let run = match client::job() {
        Some(job) => job.and_then(client::serve),
        None => bench(),
    };
    match run {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("overhead: {error}");
            ExitCode::FAILURE
        }
    }
}

fn bench() -> Result<()> {
    let machine = Machine::look(Place::Disk.directory()?)?.to_string();
    let mut criterion = Criterion::default()
        .sample_size(40)
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_millis(if is_quick() { 400 } else { 4000 }))
        .configure_from_args();
    let mut results = Results::default();
    for place in Place::ALL {
        if let Err(reason) = place.directory() {
            println!("{}: skipped, {reason}", place.name());
            results.skip(place, reason);
        }
    }
    for workload in results.workloads() {
        let template = Template::new(workload)?;
        let sittings = RefCell::new(Vec::new());
        let mut group = criterion.benchmark_group(workload.to_string());
        group.sampling_mode(SamplingMode::Flat); // equal sittings
        if workload.waits_for_disk() {
            group.sample_size(10);
        }
        for &lane in workload.lanes() {
            group.bench_function(lane.name(), |bencher| {
                bencher.iter_custom(|transactions| {
                    let sitting = Sitting::hold(&template, transactions)
                        .unwrap_or_else(|error| panic!("{workload}: {error}"));
                    let time = sitting.total[lane];
                    sittings.borrow_mut().push(sitting);
                    time
                });
            });
        }
        group.finish();
        results.add(workload, &sittings.into_inner());
    }
    criterion.final_summary();

    let table = results.to_markdown(&machine);
    if !results.is_empty() {
        println!("\n{table}");
    }
    match std::env::var_os(TABLE) {
        Some(path) => results.publish(&table, path.as_ref()),
        None => Ok(()),
    }
}

/// Whether this is one of criterion's quick runs, which it tells nobody. They end as soon as they are stable,
/// at the latest after the measurement time: that bounds how long all of them take.
fn is_quick() -> bool {
    std::env::args().any(|arg| arg == "--quick")
}
