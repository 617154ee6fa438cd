// Adopting kanbanlock in a Node.js app with better-sqlite3.
//
// What changes, once in each process, before it opens the database:
//
// ```diff
// +const KANBANLOCK = process.env.KANBANLOCK ?? '/usr/local/lib/libkanbanlock.so';
// +new Database(':memory:').loadExtension(KANBANLOCK, 'sqlite3_kanbanlockdefault_init');
// +
// ```
//
// The rest stays as it is. libkanbanlock.so is what `cargo build --release -p kanbanlock-extension` makes.
//
// What to know:
//
// - better-sqlite3 is built without URIs, so the library is loaded by its second entry point, which makes kanbanlock
//   the default VFS. The connection that has loaded it is not needed any more.
// - Once in a process is enough, its worker threads included: they share one copy of SQLite. A child process loads it
//   again.
// - `timeout` is what waits for the flock, in milliseconds. It blocks the event loop, as better-sqlite3 always does.
// - `.immediate()` begins with BEGIN IMMEDIATE. Without it a transaction that reads before it writes may get
//   SQLITE_BUSY at once, with kanbanlock or without.
//
// Run: `examples/apps/run.py better_sqlite3`, which runs it with this change and without. By itself, after
// `npm install better-sqlite3`, in an empty folder: `node app.js`, and `node app.js audit`.
'use strict';
const { spawn } = require('node:child_process');
const { once } = require('node:events');
const fs = require('node:fs');
const Database = require('better-sqlite3');

const KANBANLOCK = process.env.KANBANLOCK ?? '/usr/local/lib/libkanbanlock.so';
new Database(':memory:').loadExtension(KANBANLOCK, 'sqlite3_kanbanlockdefault_init');

const WORKERS = ['ann', 'bob'];
const TASKS_EACH = 2000;

const db = new Database('kanban.db', { timeout: 60_000 });
db.pragma('journal_mode = WAL');
db.exec('CREATE TABLE IF NOT EXISTS task (number INTEGER PRIMARY KEY, worker TEXT NOT NULL)');

/** Each task has the number after the last, whoever added that; notes each that it has been told is committed. */
function work(worker) {
  const last = db.prepare('SELECT coalesce(max(number), 0) FROM task').pluck();
  const insert = db.prepare('INSERT INTO task VALUES (?, ?)');
  const addTask = db.transaction(() => {
    const number = last.get() + 1;
    insert.run(number, worker);
    return number;
  });
  for (let count = 0; count < TASKS_EACH; count++) {
    fs.appendFileSync(`acknowledged-${worker}.txt`, `${addTask.immediate()}\n`);
  }
}

/** Every acknowledged commit is in the database, and nothing else. */
function audit() {
  const promised = new Map();
  for (const worker of WORKERS) {
    const numbers = fs.readFileSync(`acknowledged-${worker}.txt`, 'utf8').trim().split('\n');
    for (const number of numbers) promised.set(Number(number), worker);
  }
  const found = new Map(db.prepare('SELECT number, worker FROM task').raw().all());
  const lost = [...promised].filter(([number, worker]) => found.get(number) !== worker);
  if (lost.length > 0) throw new Error(`acknowledged, but not in the database: ${JSON.stringify(lost)}`);
  if (found.size !== promised.size) throw new Error(`${found.size - promised.size} tasks that nobody has added`);
  console.log(`audit: ${promised.size} commits acknowledged, and all found`);
}

async function main() {
  const start = (worker) => spawn(process.execPath, [__filename, 'work', worker], { stdio: 'inherit' });
  const ends = await Promise.all(WORKERS.map((worker) => once(start(worker), 'exit')));
  if (ends.some(([status]) => status !== 0)) throw new Error('a worker failed');
  const numbers = db.prepare('SELECT number FROM task ORDER BY number').pluck().all();
  const expected = WORKERS.length * TASKS_EACH;
  if (numbers.length !== expected || numbers.some((number, at) => number !== at + 1)) {
    throw new Error(`the numbers are not one after the other: ${numbers}`);
  }
  console.log(`${WORKERS.length} processes have added ${TASKS_EACH} tasks each: numbers 1 to ${expected}`);
  audit();
}

const [job, worker] = process.argv.slice(2);
if (job === 'work') work(worker);
else if (job === 'audit') audit();
else main();
