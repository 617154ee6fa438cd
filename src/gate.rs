//! The gate: `flock(LOCK_EX)` on `<db>.lock`, and every rule about that file.
//!
//! ## Definitions
//! *Lock file*: `<db>.lock`, next to the database as xOpen names it. *Gate*: the flock on it. *Refused*:
//! another open file description holds the flock now.
//!
//! ## Invariants
//! - The lock file is **never written, truncated or unlinked**. Its content is nobody's business, and a name
//!   that comes and goes would let two processes lock two different files.
//! - The flock held is on the file that the name `<db>.lock` leads to, since others may delete or replace it: checked
//!   after an acquire, at most once in a tick of the kernel's clock, and after each refusal. A stale descriptor is
//!   closed, the new file opened and locked.
//! - No lock file, no write: if the gate cannot be had for any reason but "refused", the write lock fails with
//!   an error that says what to do. `kanbanlock_fallback=unlocked` is the only way around, and it is logged.
//! - A descriptor is ours as long as it is open on the file that it was opened on. Other code in the process may close it (a
//!   number closed twice), and the number is then the application's: it is neither locked nor closed, but forgotten. Asked
//!   before an acquire and at a release, at most once in a tick of the kernel's clock, and before each close.
//! - Only LOCK_NB: nothing here waits for another process, but for the bounded [`Gate::await_acquire`]. Waiting is for
//!   xSleep (`wait.rs`), when SQLite holds no lock; here a refusal leaves the note that it needs.
//! - While others wait, the queue (`queue.rs`) says who may try the flock. Without it: whoever comes.
//! - In a process that a holder of the gate has started (`inner_gates.rs`), the gate is an inner one: a lock of the same
//!   lock file that strangers do not take. The outer locks are asked for first, at each acquire, through what was
//!   inherited. There is no queue then: its board is the strangers', who wait for the outer lock, and must not come
//!   first.
//! - errno is left as it was found.
//!
//! ## Cost
//! Uncontended: flock and flock for a whole write transaction, and once in a tick three fstat. No allocation, no mutex.
//! The descriptor is opened at the first write lock (a reader never touches the lock file) and kept until xClose.
//!
//! A flock belongs to the open file description (flock(2)), not to the process: two connections of one process
//! exclude each other, and a `close()` elsewhere in the process does not cancel it, unlike the POSIX locks
//! beneath SQLite.
//!
//! Uses: `descriptor`, `long_wait`, `wait`, `hint`, `inner_gates`, `queue`, `fork`, `host`, `refusal`, `events`, `sys`,
//! `stats`, `error`.

use std::cell::{Cell, RefCell};
use std::ffi::{CStr, CString, OsStr, c_int};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use crate::descriptor::{Descriptor, Opened, REPLACED_LIMIT};
use crate::error::rc;
use crate::events::{self, About};
use crate::fork;
use crate::hint::{self, NoBoard};
use crate::host::Host;
use crate::inner_gates;
use crate::long_wait::{LongWait, Message};
use crate::queue::{Enqueued, Micros, Seat};
use crate::refusal::Failure;
use crate::stats;
use crate::sys::{self, ErrnoGuard, FileId, Tick};
use crate::wait::{self, ConnectionSeat, Want};

/// A lock that is held by at most one open database file in the world.
///
/// `driver.rs` is written against this trait; [`LockFile`] is the real one.
pub trait Gate {
    /// Acquires without waiting. `Ok(false)`: refused. `Err`: an SQLite result code, already logged.
    fn try_acquire(&self) -> Result<bool, c_int>;
    /// Like [`Gate::try_acquire`], but tries again for a bounded time while refused.
    fn await_acquire(&self) -> Result<bool, c_int>;
    /// Releases. Cannot fail, and does nothing if the gate is not held.
    fn release(&self);
    /// The connection has given up its last lock of a transaction: now the next in the queue may run.
    fn transaction_over(&self);
    /// xLock SHARED was refused, since another connection writes.
    fn shared_refused(&self);
    /// xLock EXCLUSIVE is about to be forwarded.
    fn exclusive_begin(&self);
    /// … and was granted, or was refused since others read.
    fn exclusive_end(&self, is_refused: bool);
    /// The connection has had the gate and given it back without having written, for it came too late: it will wait, and
    /// wants the gate again.
    fn wanted_in_vain(&self);
    /// SQLITE_BUSY is the answer: the thread may sleep now, for this connection and for none that it has used before.
    fn answers_busy(&self);
    /// True between a successful acquire and the release.
    fn is_held(&self) -> bool;
}

/// What to do when the lock file cannot be used, or cannot do its work: a database with several names (hard links) has
/// several lock files. URI parameter `kanbanlock_fallback`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Fallback {
    /// `refuse` (default): no lock file, no write.
    #[default]
    Refuse,
    /// `unlocked`: write without the flock, under SQLite's own locks alone. Logged once per connection.
    Unlocked,
}

/// How a connection waits, and lets others wait, in microseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Waiting {
    /// How long it may go on acquiring the gate while others wait. URI parameter `kanbanlock_slice_us`.
    pub slice: Micros,
    /// A wait that is longer is worth a line in the log; 0: none is. URI parameter `kanbanlock_warn_ms`.
    pub warn_after: Micros,
}

impl Default for Waiting {
    fn default() -> Waiting {
        Waiting { slice: 1_000, warn_after: 2_000_000 }
    }
}

/// How long a checkpoint under `kanbanlock_checkpoint=gate` waits for the gate before it is skipped.
const CHECKPOINT_WAIT: Micros = 500_000;
/// How often it looks meanwhile, without a queue.
const CHECKPOINT_POLL: Duration = Duration::from_micros(500);
/// How long a connection goes without a queue that it could not have, before it tries again.
const NO_QUEUE_RETRY: Micros = 1_000_000;

/// The gate of one open database file.
#[derive(Debug)]
pub struct LockFile {
    host: Host,
    database: CString,
    path: CString,
    /// `<db>.lock-queue`, for `hint.rs`.
    queue_path: CString,
    fallback: Fallback,
    descriptor: RefCell<Option<Descriptor>>,
    /// At the queue, once somebody has waited.
    seat: RefCell<Option<Arc<ConnectionSeat>>>,
    /// How long this connection may go on while others wait.
    slice: Micros,
    /// [`Seat::wants_exclusive`]
    shared_releases: Cell<u32>,
    no_queue_until: Cell<Micros>,
    has_warned_no_queue: Cell<bool>,
    held: Cell<bool>,
    /// Held without a flock: [`Fallback::Unlocked`].
    is_unlocked: Cell<bool>,
    has_warned_unlocked: Cell<bool>,
    long_wait: LongWait,
    /// The `fork::generation` that this belongs to.
    generation: u32,
}

/// How a flock is given up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum How {
    /// For everybody who shares the open file description.
    Unlock,
    /// By us: who has inherited it keeps it.
    Close,
}

impl LockFile {
    /// The gate of `database`, a path as xOpen got it. Opens nothing yet.
    pub fn new(host: Host, database: &CStr, fallback: Fallback, waiting: Waiting) -> LockFile {
        LockFile {
            host,
            database: database.to_owned(),
            path: with_suffix(database, ".lock"),
            queue_path: with_suffix(database, ".lock-queue"),
            fallback,
            descriptor: RefCell::new(None),
            seat: RefCell::new(None),
            slice: waiting.slice,
            shared_releases: Cell::new(0),
            no_queue_until: Cell::new(0),
            has_warned_no_queue: Cell::new(false),
            held: Cell::new(false),
            is_unlocked: Cell::new(false),
            has_warned_unlocked: Cell::new(false),
            long_wait: LongWait::new(waiting.warn_after),
            generation: fork::generation(),
        }
    }

    /// `<db>.lock`
    pub fn path(&self) -> &Path {
        as_path(&self.path)
    }

    fn about(&self) -> About<'_> {
        About { database: Some(&self.database), waited_ms: None }
    }

    fn log(&self, code: c_int, message: &str) {
        self.host.log(code, message, self.about());
    }

    /// Tries the flock, and makes sure that it is the right one.
    #[inline]
    fn try_flock(&self) -> Result<bool, Failure> {
        let mut slot = self.descriptor.borrow_mut();
        for _ in 0..REPLACED_LIMIT {
            let now = sys::tick();
            if slot.as_ref().is_some_and(|open| !open.is_checked(now) && !open.is_ours()) {
                self.lost(&mut slot);
            }
            let descriptor = match &mut *slot {
                Some(descriptor) => descriptor,
                None => slot.insert(self.open()?),
            };
            let acquired = descriptor.try_lock().map_err(|error| Failure::of_flock(&self.path, &error))?;
            if !acquired {
                // Waiting anyway, so look closely: the holder of a dead file must not keep us out.
                descriptor.distrust();
            }
            match self.is_in_place(descriptor, now) {
                Ok(true) => return Ok(acquired),
                Ok(false) => {}
                Err(error) => {
                    close(&mut slot);
                    return Err(Failure::cannot_be(&self.path, "examined", &error));
                }
            }
            // Closing the stale descriptor releases its flock.
            close(&mut slot);
            stats::REPLACED.increment();
            self.log(
                rc::WARNING,
                &format!(
                    "kanbanlock: {} was deleted or replaced while in use; locking the new file. Lock files \
                     must stay: find out what removes it",
                    self.path().display()
                ),
            );
        }
        Ok(false)
    }

    /// Other code in this process has closed our descriptor.
    #[cold]
    fn lost(&self, descriptor: &mut Option<Descriptor>) {
        close(descriptor);
        self.log(
            rc::WARNING,
            &format!(
                "kanbanlock: other code in this process has closed the descriptor of {}, and with it any flock. Find out \
                 what closes a number twice",
                self.path().display()
            ),
        );
    }

    /// Opens the lock file.
    fn open(&self) -> Result<Descriptor, Failure> {
        let Opened { descriptor, complaint } = Descriptor::open(&self.path, &self.database)?;
        if let Some(complaint) = complaint {
            self.log(
                rc::WARNING,
                &format!(
                    "kanbanlock: {} names a holder of {}, but its {complaint}. This connection waits for that holder",
                    inner_gates::VARIABLE,
                    self.path().display()
                ),
            );
        }
        if descriptor.is_inside() {
            self.seat.replace(None);
        }
        Ok(descriptor)
    }

    /// True if the name still leads to the file that we hold open.
    #[inline]
    fn is_in_place(&self, descriptor: &mut Descriptor, now: Tick) -> io::Result<bool> {
        if descriptor.is_checked(now) {
            return Ok(true);
        }
        let is_in_place = descriptor.check_in_place(&self.path, now)?;
        if is_in_place && !descriptor.is_inside() {
            self.check_seat(descriptor.id(), false);
        }
        Ok(is_in_place)
    }

    /// Sits down at the queue, if there is one or `may_create`; moves if it has moved.
    fn check_seat(&self, lock_file: FileId, may_create: bool) {
        let mut seat = self.seat.borrow_mut();
        if seat.as_ref().is_some_and(|seat| seat.board().0.is_current()) {
            return;
        }
        let now = sys::micros();
        if now < self.no_queue_until.get() {
            return;
        }
        match hint::find(&self.path, &self.queue_path, lock_file, may_create) {
            Ok(hint) => *seat = Some(Arc::new(Seat::new(hint, self.slice))),
            Err(NoBoard::Nobody) => *seat = None,
            Err(NoBoard::Because(reason)) => {
                *seat = None;
                self.no_queue_until.set(sys::micros() + NO_QUEUE_RETRY);
                if !self.has_warned_no_queue.replace(true) {
                    self.log(
                        rc::WARNING,
                        &format!(
                            "kanbanlock: no fair queue: {}-queue: {reason}. Waiting connections of this process try \
                             again and again instead, in no order",
                            self.path().display()
                        ),
                    );
                }
            }
        }
    }

    /// Tries to acquire; `Ok(false)`: refused.
    #[inline]
    fn acquire(&self) -> Result<bool, Failure> {
        let is_alone = self.seat.borrow().as_ref().is_none_or(|seat| seat.is_alone());
        if is_alone && self.try_flock()? {
            if let Some(seat) = &*self.seat.borrow() {
                seat.note_holder(sys::tick().micros());
            }
            return Ok(true);
        }
        self.acquire_contended(is_alone)
    }

    /// The seat at the queue; if there is no queue yet, now there is.
    fn seat_or_new(&self) -> Option<Arc<ConnectionSeat>> {
        // A reader that has to wait has not opened the lock file.
        let is_inside =
            self.descriptor.borrow().as_ref().map_or_else(inner_gates::is_inside, Descriptor::is_inside);
        if is_inside {
            return None;
        }
        if self.seat.borrow().is_none() {
            let opened = self.descriptor.borrow().as_ref().map(Descriptor::id);
            let lock_file = opened.or_else(|| sys::lstat(&self.path).ok().map(|there| there.id))?;
            self.check_seat(lock_file, true);
        }
        self.seat.borrow().clone()
    }

    /// As the queue allows. `is_refused`: the flock has just been.
    #[inline(never)]
    fn acquire_contended(&self, is_refused: bool) -> Result<bool, Failure> {
        let Some(seat) = self.seat_or_new() else {
            return if is_refused { Ok(false) } else { self.try_flock() };
        };
        let now = sys::micros();
        seat.note_attempt(now);
        let mut seen = seat.release_count();
        // Again after a first refusal: whoever released the gate meanwhile may not have seen that we wait.
        for _ in 0..2 {
            if seat.may_try(now) && self.try_flock().inspect_err(|_| seat.give_way(now))? {
                seat.acquired(now);
                wait::over();
                return Ok(true);
            }
            if seat.enqueue(now) == Enqueued::Before {
                break;
            }
            seen = seat.release_count();
        }
        wait::refused(&seat, Want::Gate, seen, now);
        Ok(false)
    }

    #[inline(never)]
    fn release_held(&self, how: How) {
        self.held.set(false);
        let _errno = ErrnoGuard::new();
        stats::RELEASED.increment();
        if self.is_inherited() {
            return; // LOCK_UN would unlock the parent's description
        }
        if self.is_unlocked.replace(false) {
            return; // there is nothing to unlock
        }
        let mut descriptor = self.descriptor.borrow_mut();
        let Some(open) = descriptor.as_ref() else { return };
        let seat = self.seat.borrow();
        if let Some(seat) = &*seat {
            seat.note_releasing();
        }
        if how == How::Close {
            close(&mut descriptor);
        } else if !open.is_checked(sys::tick()) && !open.is_ours() {
            self.lost(&mut descriptor);
        } else if let Err(error) = open.unlock() {
            self.log(
                rc::WARNING,
                &format!("kanbanlock: {} cannot be unlocked: {error}; closing it", self.path().display()),
            );
            // "the lock is released … when all such file descriptors have been closed", flock(2).
            close(&mut descriptor);
        }
        if let Some(seat) = seat.as_ref().filter(|seat| !seat.is_alone()) {
            seat.choose_next(sys::micros());
        }
    }

    /// For a holder without a connection (`hold.rs`): [`Gate::try_acquire`], with the failure in words.
    pub fn try_hold(&self) -> Result<bool, String> {
        match self.acquire() {
            Ok(true) => Ok(self.granted()),
            Ok(false) => Ok(self.refused()),
            Err(failure) => Err(failure.message),
        }
    }

    /// While it is held: lets the program of `command` use the database, and what that starts in turn.
    pub fn hand_down(&self, command: &mut Command) -> io::Result<()> {
        let descriptor = self.descriptor.borrow();
        let open = descriptor.as_ref().ok_or(io::ErrorKind::NotFound)?;
        let number = sys::inherit(command, open.as_fd())?;
        command.env(inner_gates::VARIABLE, inner_gates::variable_with(number, open.id()));
        Ok(())
    }

    /// Gives the gate up by closing it: whoever has inherited it keeps it. ("The lock is released either by an explicit
    /// LOCK_UN operation on any of these duplicate file descriptors, or when all such file descriptors have been closed",
    /// flock(2).)
    pub fn leave_to_heirs(&self) {
        if self.held.get() {
            self.release_held(How::Close);
        }
    }

    #[inline]
    fn granted(&self) -> bool {
        stats::ACQUIRED.increment();
        if events::ENABLED && self.long_wait.is_waiting() {
            self.tell_of_wait();
        }
        self.long_wait.over();
        self.held.set(true);
        true
    }

    fn refused(&self) -> bool {
        stats::REFUSED.increment();
        let descriptor = self.descriptor.borrow();
        let holder = || self.seat.borrow().as_ref().and_then(|seat| seat.holder());
        let message = self.long_wait.refused(sys::micros(), self.path(), descriptor.as_ref(), holder);
        drop(descriptor);
        if let Some(Message { text, waited_ms }) = message {
            self.host.log(rc::WARNING, &text, About { waited_ms, ..self.about() });
        }
        false
    }

    /// A wait that was long enough for a warning is over.
    #[cold]
    #[inline(never)]
    fn tell_of_wait(&self) {
        if let Some(waited) = self.long_wait.lasted(sys::micros()) {
            let waited_ms = waited / 1000;
            let message = format!("{} was acquired after a wait of {waited_ms} ms", self.path().display());
            events::note(rc::NOTICE, &message, About { waited_ms: Some(waited_ms), ..self.about() });
        }
    }

    /// True in the child of a fork, for what the parent opened.
    fn is_inherited(&self) -> bool {
        self.generation != fork::generation()
    }

    /// Fail closed, unless the user has chosen not to.
    fn failed(&self, failure: &Failure) -> Result<bool, c_int> {
        if self.fallback == Fallback::Refuse {
            let message = format!("kanbanlock: {}", failure.message);
            return Err(self.host.log_failure(failure.code, &message, self.about()));
        }
        stats::UNLOCKED.increment();
        self.is_unlocked.set(true);
        if !self.has_warned_unlocked.replace(true) {
            self.log(
                rc::WARNING,
                &format!(
                    "kanbanlock: {}. Writing WITHOUT the lock: kanbanlock_fallback=unlocked",
                    failure.message
                ),
            );
        }
        Ok(self.granted())
    }
}

impl Gate for LockFile {
    #[inline]
    fn try_acquire(&self) -> Result<bool, c_int> {
        let _errno = ErrnoGuard::new();
        debug_assert!(!self.held.get(), "the gate is acquired once");
        match self.acquire() {
            Ok(true) => Ok(self.granted()),
            Ok(false) => Ok(self.refused()),
            Err(failure) => self.failed(&failure),
        }
    }

    fn await_acquire(&self) -> Result<bool, c_int> {
        let _errno = ErrnoGuard::new();
        let end = sys::micros() + CHECKPOINT_WAIT;
        loop {
            let seen = self.seat.borrow().as_ref().map_or(0, |seat| seat.release_count());
            if self.try_acquire()? {
                return Ok(true);
            }
            let left = end.saturating_sub(sys::micros());
            let seat = self.seat.borrow().clone();
            if left == 0 {
                wait::over();
                if let Some(seat) = seat {
                    seat.leave();
                }
                return Ok(false);
            }
            match seat {
                Some(seat) => drop(seat.sleep_until_next(left, seen, || seat.board().0.is_free())),
                None => std::thread::sleep(CHECKPOINT_POLL),
            }
        }
    }

    #[inline(always)]
    fn release(&self) {
        if self.held.get() {
            self.release_held(How::Unlock);
        }
    }

    #[inline(never)]
    fn wanted_in_vain(&self) {
        let _errno = ErrnoGuard::new();
        if let Some(seat) = self.seat_or_new() {
            // Whatever was released since then was not waited for: have a look at once.
            wait::refused(&seat, Want::Gate, seat.release_count().wrapping_sub(1), sys::micros());
        }
    }

    #[inline]
    fn transaction_over(&self) {
        if let Some(seat) = &*self.seat.borrow() {
            seat.transaction_over(sys::micros);
        }
    }

    #[inline(never)]
    fn shared_refused(&self) {
        let _errno = ErrnoGuard::new();
        let Some(seat) = self.seat_or_new() else { return };
        // A writer will want the gate next, so it waits for that; many readers can go on at once.
        seat.unreserve();
        let what = if seat.is_writer() { Want::Gate } else { Want::Release };
        wait::refused(
            &seat,
            what,
            seat.release_count().wrapping_sub(u32::from(seat.is_writer())),
            sys::micros(),
        );
    }

    #[inline]
    fn exclusive_begin(&self) {
        if let Some(seat) = &*self.seat.borrow() {
            self.shared_releases.set(seat.wants_exclusive());
        }
    }

    #[inline]
    fn exclusive_end(&self, is_refused: bool) {
        let Some(seat) = &*self.seat.borrow() else { return };
        if is_refused {
            wait::refused(seat, Want::Exclusive, self.shared_releases.get(), sys::micros());
        } else {
            seat.exclusive_over();
        }
    }

    #[inline(never)]
    fn answers_busy(&self) {
        wait::not_for_another(self.seat.borrow().as_ref());
    }

    #[inline]
    fn is_held(&self) -> bool {
        self.held.get()
    }
}

impl Drop for LockFile {
    fn drop(&mut self) {
        // Row C1: the descriptor closes here. Count the release if xClose came with the gate held.
        self.release();
        if self.is_inherited() {
            // The child's atfork handler has closed it; the number may be anything by now.
            std::mem::forget(self.descriptor.take());
        }
        close(&mut self.descriptor.borrow_mut());
    }
}

fn close(descriptor: &mut Option<Descriptor>) {
    if let Some(descriptor) = descriptor.take() {
        descriptor.close();
    }
}

/// `<path><suffix>`
pub fn with_suffix(path: &CStr, suffix: &str) -> CString {
    let mut bytes = path.to_bytes().to_vec();
    bytes.extend_from_slice(suffix.as_bytes());
    // A CStr has no NUL byte inside, and no suffix of ours has one.
    CString::new(bytes).unwrap_or_default()
}

fn as_path(path: &CStr) -> &Path {
    Path::new(OsStr::from_bytes(path.to_bytes()))
}
